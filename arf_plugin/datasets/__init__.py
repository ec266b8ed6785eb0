"""Any usual form of images becomes task data or a pool: WebDataset shards, class names, prompts, a validation split."""

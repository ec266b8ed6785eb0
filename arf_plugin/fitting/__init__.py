"""``arf fit``: from a folder of images to a fine-tuned model and what it has kept, by the commands of this package."""

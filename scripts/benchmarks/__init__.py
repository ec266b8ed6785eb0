"""What EmojiNet and IconNet share: from npm packages of drawings to models, and the grid that compares methods on both.

sources.py   a pinned package                   download.py  fetches and unpacks them
icons.py     reads icon sets                    draw.py      SVG -> PNG
write.py     shards and evaluation folders      contact.py   a sheet to check concepts by eye
files.py     whole files, markers, hashes       attribution.py  who drew what

recipe.py    the tiny models, hyper-parameters  trainer.py   runs open_clip's trainer
captioner.py  the captioner of the anchors      pretrain.py  pretrained models with several seeds
grid.sh      every method on one benchmark, by `arf ablate` on grids/*.yaml
"""

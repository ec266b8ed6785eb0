"""EmojiNet: a benchmark of robust fine-tuning for CLIP that two CPU cores can run.

About 860 concepts, each drawn by up to eleven design teams, joined on the Unicode code point.
The protocol and its figures are in docs/emojinet.md.

Data, by build.py:

    sources.py   the packages that are downloaded: versions, checksums, licences (attribution.py prints them)
    download.py  fetches and unpacks them           join.py     which icon of which vendor shows which concept
    classes.py   the 33 classes and their names     split.py    who is task, test, validation and pool
    texts.py     captions, prompts, templates       draw.py     SVG -> PNG
    write.py     shards and evaluation folders      contact.py  a sheet to check the join by eye
    twins.py     measures near-copies               files.py    whole files, markers, hashes

The comparison, by quickstart.py:

    recipe.py     all hyper-parameters              trainer.py  runs open_clip's trainer
    captioner.py  the captioner of the anchors      report.py   table, JSON, picture
"""

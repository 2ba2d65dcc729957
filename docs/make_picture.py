"""Make docs/cat.jpg, the README's picture: python docs/make_picture.py."""

from pathlib import Path

import PIL.Image

import molt
from molt.data.samples import sample_photos
from molt.overlay import draw_boxes, heat_overlay

GAP, WIDTH = 8, 320

stages = molt.Localizer().explain(sample_photos()[0].path)
photo = stages.photo.resize((WIDTH, WIDTH * stages.photo.height // stages.photo.width))
result = stages.result
tiles = [
    photo,
    heat_overlay(photo, stages.cam),
    heat_overlay(photo, stages.refined),
    draw_boxes(photo, result.boxes, result.names, result.scores, result.size),
]
strip = PIL.Image.new("RGB", (len(tiles) * (WIDTH + GAP) - GAP, photo.height), "white")
for i, tile in enumerate(tiles):
    strip.paste(tile, (i * (WIDTH + GAP), 0))
strip.save(Path(__file__).with_name("cat.jpg"), quality=88)

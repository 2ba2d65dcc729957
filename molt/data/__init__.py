"""Photos and data sets."""

from molt.data.images import Photo, PhotoError, find_photos, load_photo, photo_suffixes, read_photo
from molt.data.samples import SamplePhoto, sample_photos
from molt.data.sizes import photo_size
from molt.data.writers import Annotation, Written, join_samples
from molt.data.writers_coco import write_coco
from molt.data.writers_voc import write_voc
from molt.data.writers_wsol import write_wsol
from molt.data.writers_yolo import write_yolo
from molt.data.yolo import read_yolo

__all__ = [
    "Annotation",
    "Photo",
    "PhotoError",
    "SamplePhoto",
    "Written",
    "find_photos",
    "join_samples",
    "load_photo",
    "photo_size",
    "photo_suffixes",
    "read_photo",
    "read_yolo",
    "sample_photos",
    "write_coco",
    "write_voc",
    "write_wsol",
    "write_yolo",
]

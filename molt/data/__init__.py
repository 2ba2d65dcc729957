"""Photos and data sets."""

from molt.data.annotations import DataError, LocalizationSet, Problem, Sample
from molt.data.checking import Findings, check_set, check_sizes, inspect_set
from molt.data.coco import read_coco
from molt.data.folder import read_image_folder
from molt.data.images import Photo, PhotoError, find_photos, load_photo, photo_suffixes, read_photo
from molt.data.reading import read_set
from molt.data.samples import SamplePhoto, sample_checkpoint, sample_photos
from molt.data.sizes import photo_size
from molt.data.voc import read_voc
from molt.data.writers import Annotation, Written, join_samples
from molt.data.writers_coco import write_coco
from molt.data.writers_voc import write_voc
from molt.data.writers_wsol import write_wsol
from molt.data.writers_yolo import write_yolo
from molt.data.wsol import read_wsol
from molt.data.yolo import read_yolo

__all__ = [
    "Annotation",
    "DataError",
    "Findings",
    "LocalizationSet",
    "Photo",
    "PhotoError",
    "Problem",
    "Sample",
    "SamplePhoto",
    "Written",
    "check_set",
    "check_sizes",
    "find_photos",
    "inspect_set",
    "join_samples",
    "load_photo",
    "photo_size",
    "photo_suffixes",
    "read_coco",
    "read_image_folder",
    "read_photo",
    "read_set",
    "read_voc",
    "read_wsol",
    "read_yolo",
    "sample_checkpoint",
    "sample_photos",
    "write_coco",
    "write_voc",
    "write_wsol",
    "write_yolo",
]

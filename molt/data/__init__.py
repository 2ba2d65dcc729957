"""Photos and data sets."""

from molt.data.annotations import DataError, LocalizationSet, Problem, Sample
from molt.data.checking import Findings, check_set, inspect_set
from molt.data.coco import read_coco
from molt.data.folder import read_image_folder
from molt.data.images import Photo, PhotoError, find_photos, load_photo, photo_suffixes, read_photo
from molt.data.reading import read_set
from molt.data.samples import SamplePhoto, sample_photos
from molt.data.voc import read_voc
from molt.data.wsol import read_wsol

__all__ = [
    "DataError",
    "Findings",
    "LocalizationSet",
    "Photo",
    "PhotoError",
    "Problem",
    "Sample",
    "SamplePhoto",
    "check_set",
    "find_photos",
    "inspect_set",
    "load_photo",
    "photo_suffixes",
    "read_coco",
    "read_image_folder",
    "read_photo",
    "read_set",
    "read_voc",
    "read_wsol",
    "sample_photos",
]

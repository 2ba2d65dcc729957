"""Photos and data sets."""

from molt.data.images import Photo, PhotoError, find_photos, load_photo, photo_suffixes, read_photo
from molt.data.samples import SamplePhoto, sample_photos

__all__ = [
    "Photo",
    "PhotoError",
    "SamplePhoto",
    "find_photos",
    "load_photo",
    "photo_suffixes",
    "read_photo",
    "sample_photos",
]

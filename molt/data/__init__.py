"""Photos and data sets."""

from molt.data.images import Photo, PhotoError, find_photos, load_photo, photo_suffixes, read_photo

__all__ = ["Photo", "PhotoError", "find_photos", "load_photo", "photo_suffixes", "read_photo"]

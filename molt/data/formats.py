"""Which formats of photos are opened: those that Pillow decodes here, with those that others registered."""

from __future__ import annotations

import functools

import PIL.features
import PIL.Image

# Openers that run another program (EPS), that only identify a file and then fail to decode it, or that know a file by
# no signature and hold no photos.
_UNSAFE = frozenset({"EPS", "BUFR", "GRIB", "HDF5", "WMF", "MPEG", "FPX", "MIC", "IM", "IMT", "IPTC", "SPIDER"})
_OPTIONAL = {"WEBP": "webp", "AVIF": "avif", "JPEG2000": "jpg_2000"}  # format -> what Pillow must be built with

_has = functools.cache(PIL.features.check)


def known_formats() -> tuple[str, ...]:
    """Return the formats opened here, those whose opener was registered since included."""
    PIL.Image.init()
    # What Pillow was built without, another package may read: pillow-avif-plugin does.
    own = {form for form, (opener, _) in PIL.Image.OPEN.items() if getattr(opener, "__module__", "").startswith("PIL.")}
    lacking = {form for form in own & set(_OPTIONAL) if not _has(_OPTIONAL[form])}
    return tuple(sorted(set(PIL.Image.OPEN) - _UNSAFE - lacking))


def photo_suffixes() -> frozenset[str]:
    """Return the lower-case file suffixes of the formats Pillow decodes now, each with its dot.

    An opener that was registered since the last call, as by pillow-heif, counts.
    """
    return _suffixes(known_formats(), tuple(PIL.Image.registered_extensions().items()))


@functools.lru_cache(maxsize=1)
def _suffixes(formats: tuple[str, ...], registered: tuple[tuple[str, str], ...]) -> frozenset[str]:
    known = {*formats, "MPO"}  # opened by the JPEG reader
    return frozenset(suffix.lower() for suffix, form in registered if form in known)

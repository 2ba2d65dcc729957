"""From images or Features to integer label maps."""

from molt.clustering.kmeans import TokenKMeans

__all__ = ["TokenKMeans"]

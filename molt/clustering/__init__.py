"""From images or Features to integer label maps."""

from molt.clustering.deep import DeepClustering
from molt.clustering.kmeans import TokenKMeans
from molt.clustering.slic import Slic

__all__ = ["DeepClustering", "Slic", "TokenKMeans"]

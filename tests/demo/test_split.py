"""How a dense feed-forward is cut into experts: clusters of its inputs."""

import torch

from moeflow.demo.split import spherical_kmeans


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    centres = torch.eye(8)
    members = torch.nn.functional.normalize(centres.repeat_interleave(50, 0) + 0.05 * torch.randn(400, 8), dim=1)
    centroids = spherical_kmeans(members, 8, 10, seed=0)
    assert (centroids @ centres.T).max(0).values.min() > 0.99

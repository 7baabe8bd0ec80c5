"""The path predictor is its network, step by step."""

import numpy as np
import torch

from helpers.predictors import (
    build,
    follow,
    random_routes,
)


def test_path_predictor_is_its_network_step_by_step():
    routes, predictor = random_routes(length=20), build("path")
    with torch.no_grad():
        whole = torch.sigmoid(predictor.net(torch.from_numpy(routes.token_ids[0].astype(np.int64))[None]))[0].numpy()
    for expected, (before, _, _) in zip(whole, follow(predictor, routes, [0]), strict=True):
        np.testing.assert_allclose(before[0], expected, atol=1e-5)

"""The service's pictures after 50 steps against diffusers' own, as tests/integration/test_same_picture.py has fewer."""

from __future__ import annotations

from typing import Any

import pytest

from diffuserve_client import Client
from integration.test_same_picture import SCHEDULERS, check_same_pictures


@pytest.mark.parametrize("sampler", SCHEDULERS)
def test_no_pixel_differs_by_more_than_two_levels(client: Client, pipeline: Any, sampler: str) -> None:
    check_same_pictures(client, pipeline, sampler, 50)

"""StoreSettings: where each value comes from, and what is refused without being repeated."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
from pydantic import ValidationError

from fourmill.pipeline.store import StoreError, StoreSettings


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    for name in [name for name in os.environ if name.startswith("FOURMILL_S3_")]:
        monkeypatch.delenv(name)


def test_a_setting_comes_from_the_caller_else_the_environment_else_its_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURMILL_S3_ENDPOINT", "https://env:9000")
    monkeypatch.setenv("FOURMILL_S3_MAX_ATTEMPTS", "3")
    monkeypatch.setenv("FOURMILL_S3_ANONYMOUS", "true")
    monkeypatch.setenv("FOURMILL_S3_REGION", "")  # as good as not set
    settings = StoreSettings(endpoint="https://explicit")
    assert (settings.endpoint, settings.max_attempts, settings.anonymous) == ("https://explicit", 3, True)
    assert (settings.region, settings.addressing, settings.part_bytes) == (None, "auto", 16 << 20)
    assert StoreSettings(endpoint=None).endpoint is None


def test_settings_are_frozen_and_pickle_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURMILL_S3_REGION", "eu-central-1")
    data = pickle.dumps(StoreSettings())
    monkeypatch.setenv("FOURMILL_S3_REGION", "us-east-1")
    assert pickle.loads(data).region == "eu-central-1"
    with pytest.raises(ValidationError, match="frozen"):
        StoreSettings().region = "x"  # type: ignore[misc]


def test_an_unknown_variable_is_refused_with_the_nearest_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FOURMILL_S3_ENDPONT", "https://x")
    with pytest.raises(StoreError, match=r"'FOURMILL_S3_ENDPONT'; did you mean 'FOURMILL_S3_ENDPOINT'\?"):
        StoreSettings()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"secret_access_key": "hush"}, "secret_access_key"),
        ({"addressing": "hush"}, "'auto', 'path' or 'virtual'"),
        ({"endpoint": "hush:9000"}, "begin with http"),
        ({"part_bytes": 1000}, "5242880"),
        ({"max_attempts": 0}, "greater than or equal to 1"),
        ({"kms_key_id": "hush"}, "has no effect"),
        ({"server_side_encryption": "AES256", "kms_key_id": "hush"}, "has no effect"),
    ],
)
def test_what_cannot_be_is_refused_and_not_repeated(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message) as refused:
        StoreSettings(**settings)
    assert "hush" not in str(refused.value)


@pytest.mark.parametrize("by", ["caller", "environment"])
def test_an_endpoint_with_a_password_is_refused_and_not_repeated(monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    endpoint = "https://user:hush@host:9000"
    if by == "environment":
        monkeypatch.setenv("FOURMILL_S3_ENDPOINT", endpoint)
    with pytest.raises(StoreError, match=r"storage\.endpoint holds a user name or password") as refused:
        StoreSettings(endpoint=endpoint) if by == "caller" else StoreSettings()
    assert "hush" not in str(refused.value)

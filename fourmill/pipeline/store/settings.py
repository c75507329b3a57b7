"""How an object store is reached. No credentials: those come from boto3's own chain (AWS_*, profiles, roles).

A setting is taken from the configuration, else from the environment (FOURMILL_S3_ENDPOINT, FOURMILL_S3_REGION, …), else
its default; what is still None is left to boto3's chain (AWS_ENDPOINT_URL_S3, AWS_REGION, AWS_PROFILE, ~/.aws/config).
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fourmill.modalities import unknown
from fourmill.pipeline.store.base import StoreError

_ENVIRONMENT = "FOURMILL_S3_"
_MIB = 1 << 20


class StoreSettings(BaseModel):
    """Of S3 stores; local folders have none. Frozen, and pickled with the store, so that workers see the driver's."""

    # Inputs are hidden: a refused value may be a key that somebody put in the wrong place.
    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    endpoint: str | None = None
    """Of a store that is not AWS: https://host:port."""
    region: str | None = None
    """Where the bucket lies, such as eu-central-1."""
    profile: str | None = None
    """Name of a profile in ~/.aws, which holds the credentials."""
    addressing: Literal["auto", "path", "virtual"] = "auto"
    """Bucket in the path (https://host/bucket/key) or in the host name (https://bucket.host/key)."""
    anonymous: bool = False
    """Send no credentials: public buckets."""
    requester_pays: bool = False
    """Agree to pay for requests to somebody else's bucket."""
    server_side_encryption: Literal["AES256", "aws:kms", "aws:kms:dsse"] | None = None
    """Asked for with every object written; by default what the bucket does by itself."""
    kms_key_id: str | None = None
    """Key of aws:kms; by default the account's."""
    multipart_threshold: int = Field(default=64 * _MIB, ge=5 * _MIB, le=5 << 30)
    """Bytes above which an object moves in parts, several at once; a single PUT takes 5 GiB at most."""
    part_bytes: int = Field(default=16 * _MIB, ge=5 * _MIB, le=5 << 30)
    """Bytes in a part; more where 10,000 parts would not do."""
    connect_timeout_s: float = Field(default=10.0, gt=0)
    """Seconds."""
    read_timeout_s: float = Field(default=60.0, gt=0)
    """Seconds without a byte."""
    max_attempts: int = Field(default=8, ge=1)
    """Tries of one request, the first included."""
    max_retry_s: float = Field(default=120.0, ge=0)
    """Seconds after its first try in which a request is tried again."""
    conditional_writes: Literal["probe", "atomic", "single", "none"] = "probe"
    """Whether the store creates an object only if its name is free: found out by a small race, or known to hold
    always, for single PUTs only, or not at all."""
    listing: Literal["auto", "unsorted"] = "auto"
    """'unsorted' for a store that lists in no order: a listing is then held in memory and sorted."""

    @model_validator(mode="before")
    @classmethod
    def _with_environment(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        settings = {**_from_environment(cls), **given}
        # Not a ValueError: pydantic would put the value beside the message, and a configuration's checker prints it.
        if "@" in urlsplit(str(settings.get("endpoint") or "")).netloc:
            raise StoreError("storage.endpoint holds a user name or password: give https://host:port; AWS_* say who")
        return settings

    @model_validator(mode="after")
    def _consistent(self) -> StoreSettings:
        if self.endpoint is not None and not self.endpoint.startswith(("http://", "https://")):
            raise ValueError("endpoint must begin with http:// or https://")
        if self.kms_key_id and not (self.server_side_encryption or "").startswith("aws:kms"):
            raise ValueError("kms_key_id has no effect: server_side_encryption is not aws:kms or aws:kms:dsse")
        return self


def _from_environment(model: type[BaseModel]) -> dict[str, str]:
    names = {f"{_ENVIRONMENT}{field.upper()}": field for field in model.model_fields}
    found = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT) and value}
    for name in found:
        if name not in names:
            raise StoreError(unknown("environment variable", name, list(names)))
    return {names[name]: value for name, value in found.items()}

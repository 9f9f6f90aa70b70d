"""One frozen Settings, read once from LOOKALIKE_* variables; command-line flags are set over it."""

from pathlib import Path

from pydantic import Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from service.encoding.images import Limits


class Settings(BaseSettings):
    """What a service can be told. Every field is an environment variable: LOOKALIKE_MODEL, LOOKALIKE_STORE …

    Attributes:
        model: the encoder's folder; None takes the one the store was built with, else the one for photographs.
        store: the store's folder; made when it is not there.
        no_store: whether to embed alone and keep nothing.
        workers: processes that serve; more than one only without a store, which has one writer.
        device: "auto", "cpu" or "cuda".
        variant: of the encoder: "auto" for the fastest here, "fp32", "fp16" or "int8".
        host, port: where the service listens.
        keep_originals: whether the store keeps the pictures' own bytes.
        read_only: open the store beside the process that changes it; every change is refused.
        exact_limit: pictures up to which a search looks at every one; above it, at a part with a measured recall.
        vector_type: float32 or float16, of vectors on disk, in a store that is new.
        api_keys: "read:KEY" and "write:KEY", with commas between; none and no api_keys_file: no key is asked for.
        api_keys_file: a file of them, one a line.
        metrics_public: whether /metrics answers without a key.
        cors_origins: origins whose pages may call the API from a browser, with commas between; "*" for all.
        max_image_bytes, max_pixels, max_side, max_aspect: what a picture may be (images.Limits).
        max_images: pictures a request; max_bulk_images: in a POST /images.
        max_request_bytes: body of a request; max_buffered_bytes: of all that are being received.
        max_id_bytes, max_metadata_bytes: of an item, in UTF-8.
        max_k: neighbours a query; max_queries: queries a search; max_k_of_many: neighbours of each where they are many.
        max_waiting: requests at work or waiting for it.
        body_timeout_s: time for a whole body to come in; work_timeout_s: for the work on it.
    """

    model_config = SettingsConfigDict(env_prefix="LOOKALIKE_", frozen=True, extra="ignore")

    model: Path | None = None
    store: Path = Path(".lookalike/store")
    no_store: bool = False
    workers: int = Field(default=1, ge=1, le=64)
    device: str = Field(default="auto", pattern="^(auto|cpu|cuda)$")
    variant: str = Field(default="auto", pattern="^(auto|fp32|fp16|int8)$")
    host: str = "127.0.0.1"
    port: int = Field(default=3000, ge=1, le=65535)
    keep_originals: bool = True
    read_only: bool = False
    exact_limit: int = Field(default=100_000, ge=1000)
    vector_type: str = Field(default="float32", pattern="^(float32|float16)$")
    api_keys: SecretStr = SecretStr("")
    api_keys_file: Path | None = None
    metrics_public: bool = False
    cors_origins: str = ""
    max_image_bytes: int = Field(default=10_000_000, ge=1)
    max_pixels: int = Field(default=25_000_000, ge=1)
    max_side: int = Field(default=10_000, ge=1)
    max_aspect: int = Field(default=100, ge=1)
    max_images: int = Field(default=32, ge=1)
    max_bulk_images: int = Field(default=10_000, ge=1)
    max_request_bytes: int = Field(default=64_000_000, ge=1)
    max_buffered_bytes: int = Field(default=1_000_000_000, ge=1)
    max_id_bytes: int = Field(default=256, ge=1)
    max_metadata_bytes: int = Field(default=16_384, ge=2)
    max_k: int = Field(default=1000, ge=1)
    max_queries: int = Field(default=64, ge=1)
    max_k_of_many: int = Field(default=100, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    body_timeout_s: float = Field(default=30, gt=0)
    work_timeout_s: float = Field(default=30, gt=0)

    @property
    def limits(self) -> Limits:
        """What a picture may be."""
        return Limits(self.max_image_bytes, self.max_pixels, self.max_side, self.max_aspect)

"""One frozen Settings, read once from LOOKALIKE_* variables; command-line flags override them."""

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SecretStr, ValidationError, model_validator

from service import memory_bytes
from service.encoding.limits import OWN_FILES, Limits
from service.errors import InvalidRequest

_PREFIX = "lookalike_"
# Segments of unreserved characters that do not begin with a dot.
PREFIX = r"(/[A-Za-z0-9_~-][A-Za-z0-9._~-]*)*"


def _without_brackets(host: Any) -> Any:
    return host.strip("[]") if isinstance(host, str) else host


def _with_slash(path: Any) -> Any:
    return f"/{path.strip('/')}".rstrip("/") if isinstance(path, str) else path


class Settings(BaseModel):
    """All settings of a service. Every field is an environment variable: LOOKALIKE_MODEL, LOOKALIKE_STORE …

    A variable that is empty counts as one that is not set.

    Attributes:
        model: the encoder's folder; None means the encoder of the store, or for a new store the one for photographs.
        store: the store's folder, which is made if it does not exist; or a collection of Milvus, as
            milvus_address.parse_address reads it.
        milvus_token: for Milvus, such as user:password; empty if it asks for none.
        pictures: where a store on Milvus keeps thumbnails and originals: a path of fsspec, such as s3://bucket/folder;
            without it they are left out.
        no_store: whether the service only embeds and keeps nothing.
        workers: processes that serve; more than one needs no_store or a Milvus server, because a store in a folder
            has one writer.
        device: "auto", "cpu" or "cuda".
        runtime: what runs the encoder: "onnxruntime", "openvino", or "auto" for the faster here.
        variant: the encoder's variant: "fp32", "bf16", "fp16" or "int8"; "auto" for the fastest here.
        measured: what `serve` measured as the fastest, for its workers (Encoder.choice); not for users.
        host, port: where the service listens.
        root_path: the path below which a proxy publishes the service, such as /lookalike.
        trust_forwarded_prefix: whether X-Forwarded-Prefix names that path, request by request; only for a service that
            nobody reaches but through a proxy which sets or removes this header.
        keep_originals: whether the store keeps the pictures' own bytes. `lookalike index` keeps those of a folder's
            files only if this is set to true: it has their paths.
        preview_cache_bytes: size of the previews that are kept in the store's folder; 0 keeps none.
        read_only: open the store beside the process that changes it; every change is refused.
        exact_limit: up to this many items a search scans all; above it, a part of them with a measured recall.
        vector_type: float32 or float16, the type of vectors on disk in a new store.
        api_keys: "read:KEY" and "write:KEY", separated by commas; without any, and without api_keys_file, the service
            asks for no key.
        api_keys_file: a file of such keys, one a line.
        metrics_public: whether /metrics answers without a key.
        cors_origins: origins whose pages may call the API from a browser, separated by commas; "*" for all.
        max_image_bytes, max_pixels, max_side, max_aspect, max_decode_s: limits of a picture (images.Limits). The
            defaults are for strangers; `read_own_settings` has others for one's own files.
        max_texts, max_text_characters: texts in a request, and characters of a text.
        max_images: pictures in a request; max_bulk_images: pictures in a POST /images.
        max_request_bytes: body of a request; max_buffered_bytes: all bodies that are being received; by default an
            eighth of the memory, and at most 1 GB.
        max_id_bytes, max_metadata_bytes: limits of an item, in UTF-8.
        max_k: neighbours of a query; max_queries: queries in a search; max_k_of_many: neighbours of each of several.
        max_waiting: requests that are at work or wait for a thread.
        body_timeout_s: time for a whole body to arrive; work_timeout_s: time for the work on it.
    """

    model_config = ConfigDict(frozen=True, extra="ignore")

    model: Path | None = None
    store: Path = Path(".lookalike/store")
    milvus_token: SecretStr = SecretStr("")
    pictures: str = ""
    no_store: bool = False
    workers: int = Field(default=1, ge=1, le=64)
    device: str = Field(default="auto", pattern="^(auto|cpu|cuda)$")
    runtime: str = Field(default="auto", pattern="^(auto|onnxruntime|openvino)$")
    variant: str = Field(default="auto", pattern="^(auto|fp32|bf16|fp16|int8)$")
    measured: str = Field(default="", pattern="^([0-9a-f]{64}:(onnxruntime|openvino):(fp32|bf16|fp16|int8))?$")
    host: Annotated[str, BeforeValidator(_without_brackets)] = "127.0.0.1"
    port: int = Field(default=3000, ge=1, le=65535)
    root_path: Annotated[str, BeforeValidator(_with_slash)] = Field(default="", pattern=f"^{PREFIX}$")
    trust_forwarded_prefix: bool = False
    keep_originals: bool = True
    preview_cache_bytes: int = Field(default=0, ge=0)
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
    max_decode_s: float = Field(default=1.5, gt=0)
    max_images: int = Field(default=32, ge=1)
    max_texts: int = Field(default=256, ge=1)
    max_text_characters: int = Field(default=10_000, ge=1)
    max_bulk_images: int = Field(default=10_000, ge=1)
    max_request_bytes: int = Field(default=64_000_000, ge=1)
    max_buffered_bytes: int = Field(default_factory=lambda: min(1_000_000_000, memory_bytes() // 8), ge=1)
    max_id_bytes: int = Field(default=256, ge=1)
    max_metadata_bytes: int = Field(default=16_384, ge=2)
    max_k: int = Field(default=1000, ge=1)
    max_queries: int = Field(default=64, ge=1)
    max_k_of_many: int = Field(default=100, ge=1)
    max_waiting: int = Field(default=256, ge=1)
    body_timeout_s: float = Field(default=30, gt=0)
    work_timeout_s: float = Field(default=30, gt=0)

    @model_validator(mode="before")
    @classmethod
    def _over_environment(cls, given: dict[str, Any]) -> dict[str, Any]:
        variables = {name.lower(): value for name, value in os.environ.items()}
        found = {field: variables.get(_PREFIX + field) for field in cls.model_fields}
        return {field: value for field, value in found.items() if value is not None and value.strip()} | given

    @property
    def folder(self) -> Path:
        """Folder of this machine for what belongs to the store and is not in it, such as lists of what was left out."""
        return Path(".lookalike/milvus") if str(self.store).startswith(("milvus:", "milvuss:")) else self.store

    @property
    def limits(self) -> Limits:
        """The limits of a picture."""
        return Limits(self.max_image_bytes, self.max_pixels, self.max_side, self.max_aspect, self.max_decode_s)


def read_settings(**flags: Any) -> Settings:
    """Return the settings of the environment, with the flags that are not None set over them.

    Raises:
        InvalidRequest: a value is not allowed; the message names its variable.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        raise InvalidRequest(f"LOOKALIKE_{str(first['loc'][0]).upper()}: {first['msg']}") from error


def read_own_settings(**flags: Any) -> Settings:
    """Return settings for one's own files: limits of a picture that are not set are images.OWN_FILES.

    Raises:
        As `read_settings`.
    """
    settings = read_settings(**flags)
    return settings.model_copy(
        update={name: value for name, value in asdict(OWN_FILES).items() if name not in settings.model_fields_set}
    )

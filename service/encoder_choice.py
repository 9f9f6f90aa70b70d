"""The encoder of a gallery when the user names none."""

from pathlib import Path

from service.settings import Settings
from service.store import embedded
from service.store.catalog import no_store
from service.store.milvus_address import parse_address


def recorded_model(settings: Settings) -> tuple[Path, str] | None:
    """Return folder and name of the encoder that built the store of the settings; None if there is no store.

    Raises:
        InvalidStore: the store is damaged, or cannot be reached.
    """
    if settings.no_store:
        return None
    address = parse_address(settings.store)
    if address is None:
        return embedded.recorded_model(settings.store)
    # pymilvus is an extra.
    from service.store.milvus_connection import recorded_model as recorded_on_milvus

    return recorded_on_milvus(address, settings.milvus_token.get_secret_value())


def find_model(settings: Settings, source: str = "") -> Path:
    """Return the encoder's folder: the one that the settings name, else the store's own, else the default.

    A store that came from another machine may name a folder that does not exist here. An encoder of the same name that
    comes along is taken then, else the default; its fingerprint decides whether it is the right one.

    Args:
        settings: name the encoder, or the store.
        source: pictures that will be added; the default for digits differs from the one for photographs.

    Raises:
        InvalidModel, InvalidOutput: the default encoder cannot be made.
        InvalidStore: the store is damaged, or does not exist and is opened read-only.
    """
    if settings.model:
        return settings.model
    recorded = recorded_model(settings)
    if recorded is None and settings.read_only and not settings.no_store:
        raise no_store(settings.store)
    if recorded is not None and recorded[0].is_dir():
        return recorded[0]
    if recorded is not None and (shipped := Path("models") / recorded[1]).is_dir():
        return shipped
    # Imported late because it needs onnx, whose import takes most of a second.
    from service.encoding.pretrained import default_encoder, of_digits

    return default_encoder(recorded is None and of_digits(source))


def choose_model(settings: Settings, source: str = "") -> tuple[Path, str]:
    """Return the encoder's folder, and a sentence that tells the user of a default, or "".

    Args:
        settings: name an encoder, or a store whose encoder it is.
        source: the SOURCE that a new store is for; its kind decides about the default.

    Raises:
        InvalidModel, InvalidOutput, InvalidStore: as find_model.
    """
    model = find_model(settings, source)
    if settings.model is not None or recorded_model(settings) is not None:
        return model, ""
    # onnx takes most of a second to import.
    from service.encoding.pretrained import of_digits

    kind = "digits" if of_digits(source) else "photographs"
    return model, f"encoder: {model}, the default for {kind}; --model names another"

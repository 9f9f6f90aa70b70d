"""Which encoder a gallery gets where the user names none."""

from pathlib import Path

from service.gallery import find_model
from service.settings import Settings
from service.store.embedded import recorded_model


def choose_model(settings: Settings, source: str = "") -> tuple[Path, str]:
    """Return the encoder's folder, and a sentence that tells the user of a default, or "".

    Args:
        settings: name an encoder, or a store whose encoder it is.
        source: the SOURCE that a new store is for; its kind decides about the default.

    Raises:
        InvalidModel, InvalidOutput, InvalidStore: as find_model.
    """
    model = find_model(settings, source)
    if settings.model is not None or (not settings.no_store and recorded_model(settings.store) is not None):
        return model, ""
    # onnx takes most of a second to import.
    from service.encoding.pretrained import of_digits

    kind = "digits" if of_digits(source) else "photographs"
    return model, f"encoder: {model}, the default for {kind}; --model names another"

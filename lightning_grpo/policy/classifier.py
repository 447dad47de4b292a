"""Loading of sequence classifiers, such as reward models."""

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lightning_grpo.errors import UserError
from lightning_grpo.policy.load import DTYPES, errors_named, load_weights, read_config
from lightning_grpo.policy.pretrained import Pretrained


def load_classifier(model: Pretrained, *, dtype: str) -> PreTrainedModel:
    """Load a sequence classifier for inference: in evaluation mode, without gradients, on the CPU.

    Raises:
        UserError: the model can't be found or read, has no classification head, or has weights that are not finite.
    """
    config = read_config(model)
    for name, value in model.configured(config).items():
        setattr(config, name, value)
    architectures = config.architectures or []
    if architectures and not any(name.endswith("ForSequenceClassification") for name in architectures):
        raise UserError(
            f"model is {model.name!r}, which is a {architectures[0]}: it has no head that scores a text; set a "
            "sequence classifier that was trained as a reward model"
        )
    options = {name: value for name, value in model.kwargs.items() if not hasattr(config, name)}
    # transformers initializes weights before it loads them, and would change the random numbers of the run
    with torch.random.fork_rng(devices=[]), errors_named(model.name, ""):
        classifier = load_weights(
            config, model, kind=AutoModelForSequenceClassification, dtype=DTYPES[dtype], **options
        )
    return classifier.eval().requires_grad_(False)

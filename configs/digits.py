"""A small VGG on scikit-learn's digits: the demo.

Cost: training takes 6 s and fine-tuning 3 s on 2 CPU cores, plus compilation; no data
to prepare. Expected: 98 % of the test scans before pruning.
"""

from ml_collections import ConfigDict

from jaxprune.arguments import job_arguments, pruning, to_config
from jaxprune.options import Calibration, Options, Training


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the file's name and a colon."""
    args = job_arguments(arg)
    config = to_config(
        Options(
            data="digits",
            validation=0.1,
            model="vgg_small",
            train=Training(
                epochs=20, batch_size=64, learning_rate=0.05, weight_decay=0.001
            ),
            calibration=Calibration(examples=1000),
            prune=pruning(args, layer_epochs=2),
            finetune=Training(
                epochs=8, batch_size=64, learning_rate=0.02, weight_decay=0.001
            ),
        )
    )
    if args.runlocal:
        _trial(config)
    return config


def _trial(config: ConfigDict) -> None:
    """Cuts everything down to a trial of about a minute on 2 CPU cores."""
    config.train.epochs = 4
    config.finetune.epochs = 2
    config.prune.layer_epochs = min(config.prune.layer_epochs, 1)

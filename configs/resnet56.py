"""ResNet-56 on CIFAR-10.

Cost: made for one accelerator, 200 epochs of training and 40 of fine-tuning. On 2 CPU
cores start from trained weights (init_from) and fine-tune for an epoch or two, or take
the argument runlocal: ResNet-20 at half the width on 2,000 images, about a minute, its
accuracies mean nothing. Expected: about 93 % before pruning is what the literature
reports for this network and recipe.
"""

from ml_collections import ConfigDict

from jaxprune.arguments import job_arguments, pruning, to_config
from jaxprune.options import Calibration, Options, Training


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the file's name and a colon."""
    args = job_arguments(arg)
    redundancy = args.method == "importance_redundancy"
    config = to_config(
        Options(
            data="cifar10",
            validation=0.02,
            model="resnet56",
            train=Training(
                epochs=200,
                batch_size=128,
                learning_rate=0.1,
                weight_decay=0.0005,
                warmup_epochs=2.0,
            ),
            # importance_redundancy estimates entropies and correlations.
            calibration=Calibration(examples=10_000 if redundancy else 5000),
            prune=pruning(args, layer_epochs=3),
            finetune=Training(
                epochs=40,
                batch_size=128,
                learning_rate=0.02,
                weight_decay=0.0005,
                warmup_epochs=2.0,
            ),
        )
    )
    if args.runlocal:
        _trial(config)
    return config


def _trial(config: ConfigDict) -> None:
    """Cuts everything down to a trial of about a minute on 2 CPU cores."""
    config.width = 0.5
    config.model = "resnet20"  # Compiling ResNet-56 alone takes a minute.
    config.train_examples = 2000
    config.test_examples = 1000
    config.train.epochs = 2
    config.finetune.epochs = 1
    config.prune.layer_epochs = 0
    config.calibration.examples = 512
    config.calibration.batch_size = 128
    config.latency_batch = 16

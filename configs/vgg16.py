"""VGG-16 with batch normalisation on CIFAR-10.

Cost: made for one accelerator, 160 epochs of training and 40 of fine-tuning. On 2 CPU
cores start from trained weights (init_from) and fine-tune for an epoch or two, or take
the argument runlocal: a quarter of the width on 2,000 images, about a minute, its
accuracies mean nothing. Expected: 93 to 94 % before pruning is what the literature
reports for this network and recipe.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder

from jaxprune.arguments import parse_arguments


def get_config(arg: str | None = None) -> ConfigDict:
    """The configuration; `arg` is what follows the file's name and a colon."""
    args = parse_arguments(arg, method="cpli", macs=0.5, preset="", runlocal=False)
    redundancy = args.method == "importance_redundancy"
    config = ConfigDict()
    config.seed = 0

    config.data = "cifar10"
    config.data_dir = placeholder(str)  # None: $TFDS_DATA_DIR or ~/tensorflow_datasets
    config.image_size = placeholder(int)
    config.validation = 0.02
    config.train_examples = placeholder(int)
    config.test_examples = placeholder(int)

    config.model = "cifar_vgg16_bn"
    config.width = 1.0
    config.dtype = "float32"
    config.init_from = placeholder(str)  # a checkpoint directory or npz: no training

    config.train = _training(
        epochs=160, batch_size=128, learning_rate=0.05, weight_decay=5e-4
    )

    config.calibration = ConfigDict()
    # importance_redundancy estimates entropies and correlations: at least 10,000.
    config.calibration.examples = 10_000 if redundancy else 5000
    config.calibration.batch_size = 250

    config.prune = ConfigDict()
    config.prune.method = args.method
    # The share that remains; importance_redundancy is steered by its thresholds.
    config.prune.macs = placeholder(float) if redundancy else args.macs
    config.prune.params = placeholder(float)
    config.prune.preset = args.preset
    config.prune.entropy_threshold = 0.3 if redundancy else placeholder(float)
    config.prune.similarity_threshold = 0.8 if redundancy else placeholder(float)
    config.prune.layer_epochs = 3 if redundancy else 0
    config.prune.recalibrate = False

    config.finetune = _training(
        epochs=40, batch_size=128, learning_rate=0.02, weight_decay=5e-4
    )
    config.latency_batch = 64

    if args.runlocal:
        _shrink(config)
    return config


def _training(
    *, epochs: int, batch_size: int, learning_rate: float, weight_decay: float
) -> ConfigDict:
    config = ConfigDict()
    config.epochs = epochs
    config.batch_size = batch_size
    config.learning_rate = learning_rate
    config.optimizer = "sgd"
    config.momentum = 0.9
    config.weight_decay = weight_decay
    config.decay_all = True
    config.warmup_epochs = 2.0
    config.clip_norm = placeholder(float)
    config.label_smoothing = 0.0
    config.ema = 0.0
    config.distill_weight = 0.0  # in fine-tuning, from the unpruned network
    config.temperature = 4.0
    return config


def _shrink(config: ConfigDict) -> None:
    """Cuts everything down to a trial of about a minute on 2 CPU cores."""
    config.width = 0.25
    config.train_examples = 2000
    config.test_examples = 1000
    config.train.epochs = 2
    config.finetune.epochs = 1
    config.prune.layer_epochs = 0
    config.calibration.examples = 512
    config.calibration.batch_size = 128
    config.latency_batch = 16

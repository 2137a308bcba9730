"""The licences of models that are trained on the data sets of the presets."""

import re


# A pattern of the data's name -> (licence of the model, sentence about the data). The licence is that of the data if
# the data restricts use (AFHQ is not for commercial use), else Apache-2.0.
NON_COMMERCIAL = "cc-by-nc-4.0"
LICENCES = {
    r"(huggan/)?afhq.*": (
        NON_COMMERCIAL,
        "Animal Faces-HQ by Choi et al., NAVER Corp. ([StarGAN v2](https://arxiv.org/abs/1912.01865), CVPR 2020), "
        "[CC BY-NC 4.0](https://creativecommons.org/licenses/by-nc/4.0/): credit its authors, no commercial use. The "
        "same holds for this model.",
    ),
    r"(ylecun/)?mnist": ("apache-2.0", "MNIST by LeCun, Cortes and Burges; its Hub page states the MIT licence."),
    r"(uoft-cs/)?cifar10": ("apache-2.0", "CIFAR-10 by Krizhevsky, Nair and Hinton (2009), who state no licence."),
    r"digits": (
        "apache-2.0",
        "Optical Recognition of Handwritten Digits by Alpaydin and Kaynak, UCI, "
        "[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), the copy in scikit-learn.",
    ),
}
UNKNOWN_LICENCE = (
    None,
    "their licence is not known here. Find out where the images are from before you build on this model.",
)


def licence_of(dataset_name: str | None, base_model: dict) -> tuple[str | None, str]:
    """Return the licence of a model (None if it is not known), and a sentence about the training images.

    Args:
        dataset_name: the --dataset_name of the training: a Hub id, or the name of a folder with a copy of a known
            data set. None for the user's own images.
        base_model: the "base_model" of train_config.json. {} if the training began without --init_from.
    """
    name = dataset_name or ""
    known = (entry for pattern, entry in LICENCES.items() if re.fullmatch(pattern, name, re.IGNORECASE))
    licence, about_data = next(known, UNKNOWN_LICENCE)
    if not base_model:
        return licence, about_data
    about_data += " The licence of the model that the training started from applies too."
    return (licence if licence == NON_COMMERCIAL else None), about_data

"""Licences of the data sets that the presets name."""

# A pattern of the data's name -> (licence, sentence about the data). A model gets the licence of its data:
# for example, a model trained on AFHQ is not for commercial use.
LICENCES = {
    r"(huggan/)?afhq.*": (
        "cc-by-nc-4.0",
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

"""Packaging. The tools' settings live in pyproject.toml; everything about the distribution is here."""

from setuptools import setup

setup(
    name="twdpo",
    version="0.1.0",
    description="Token-weighted Direct Preference Optimization (TwDPO) and AttentionPO in plain PyTorch",
    python_requires=">=3.10",
    # Never "kernels" itself: a top-level package of that name breaks transformers, which looks for its own.
    packages=["twdpo", *(f"twdpo.{name}" for name in ("models", "judge", "pages", "toy", "kernels"))],
    package_dir={"twdpo": "twdpo", "twdpo.kernels": "kernels"},
    package_data={"twdpo.toy": ["model/*"]},
    # Up to the newest minor versions that the tests were run on: raise an end when they pass on what is newer.
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6,<3.10; platform_system == 'Linux'",
        "transformers>=5.17,<5.25",
        "sentencepiece>=0.2,<0.3",
        "numpy>=1.26,<2.5",
        "wandb>=0.19,<0.32",
        "tqdm>=4.66,<4.71",
    ],
    extras_require={"hub": ["datasets>=4.0,<5.3"],
                    "dev": ["pytest>=8,<9.3", "ruff>=0.9,<0.18", "datasets>=4.0,<5.3", "POT>=0.9.5,<0.9.8"]},
)

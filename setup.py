"""Packaging. The tools' settings live in pyproject.toml; everything about the distribution is here."""

from setuptools import setup

setup(
    name="twdpo",
    version="0.1.0",
    description="Token-weighted Direct Preference Optimization (TwDPO) and AttentionPO in plain PyTorch",
    python_requires=">=3.10",
    # Never "kernels" itself: a top-level package of that name breaks transformers, which looks for its own.
    packages=["twdpo", "twdpo.kernels"],
    package_dir={"twdpo": "twdpo", "twdpo.kernels": "kernels"},
    package_data={"twdpo": ["toy_model/*"]},
    install_requires=[
        "torch>=2.11,<2.14",
        "triton>=3.6; platform_system == 'Linux'",
        "transformers>=5.17,<6",
        "sentencepiece",
        "numpy",
        "wandb",
        "tqdm",
    ],
    extras_require={"hub": ["datasets"], "dev": ["pytest", "ruff"]},
)

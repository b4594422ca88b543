"""Package metadata. Installing compiles nothing: kernels are compiled at first use."""

from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SHIPPED = ("csrc", "configs")
ABLATE = ["optuna>=4", "submitit>=1.5"]
EXPORT = ["onnx>=1.17", "onnxscript>=0.5", "onnxruntime>=1.20"]


class BuildWithSources(build_py):
    """Copy ``csrc/`` and ``configs/`` into the package, so that the wheel needs nothing beside it."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder in SHIPPED:
            for source in sorted((ROOT / folder).rglob("*")):
                if source.is_file() and "__pycache__" not in source.parts:
                    target = Path(self.build_lib) / "natrain" / source.relative_to(ROOT)
                    self.mkpath(str(target.parent))
                    self.copy_file(str(source), str(target))


setup(
    name="natrain",
    version="0.1.0",
    description="Train, fine-tune and ablate Neighborhood Attention Transformers on JIT-compiled kernels",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.10",
    packages=find_packages(include=["natrain", "natrain.*"]),
    package_data={"natrain.models.weights": ["*.safetensors"]},
    cmdclass={"build_py": BuildWithSources},
    install_requires=[
        "torch>=2.7,<2.15",
        "torchvision>=0.22",
        "timm>=1.0.31",
        "hydra-core>=1.3.2,<1.5",
        # 2.6.2 and 2.6.3 were malware (GHSA-w37p-236h-pfx3).
        "lightning>=2.6.4",
        "ninja>=1.11",
        "wandb>=0.19",
        "pyarrow>=15",
        "matplotlib>=3.8",
    ],
    extras_require={
        "digits": ["scikit-learn>=1.4"],
        "export": EXPORT,
        "tensorboard": ["tensorboard>=2.14"],
        "ablate": ABLATE,
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "scikit-learn>=1.4",
            "tensorboard>=2.14",
            "setuptools>=69",
            *EXPORT,
            *ABLATE,
        ],
        "dev": ["ruff>=0.8", "build"],
    },
    entry_points={"console_scripts": ["natrain = natrain.cli:main"]},
)

from setuptools import find_packages, setup

TEST = [
    "bitsandbytes>=0.50",
    "hypothesis>=6.100",
    "mypy>=1.11",
    "onnxruntime>=1.20",
    "pytest>=8",
    "pytest-benchmark>=5",
    "pytest-xdist>=3.6",
    "rapidocr>=3.10,<4",
    "ruff>=0.9",
    "triton>=3.5; platform_system == 'Linux'",
    "types-PyYAML",
]

setup(
    name="dgpo_fast",
    version="0.1.0",
    description="Direct Group Preference Optimization for diffusion models, at the speed of the GPU",
    license="Apache-2.0",
    python_requires=">=3.11",
    # `kernels` itself is no package: the name belongs to a Hugging Face library that diffusers imports.
    packages=[*find_packages(include=["dgpo_fast", "dgpo_fast.*"]), "dgpo_kernels", "dgpo_kernels.triton"],
    package_dir={"dgpo_kernels": "kernels/dgpo_kernels"},
    package_data={
        "dgpo_fast.tiny": ["pipeline/**/*", "pipeline/*"],
        "dgpo_fast.evaluation": ["page.*"],
        "dgpo_fast.profiling": ["page.*"],
    },
    install_requires=[
        "torch>=2.11,<2.14",
        "diffusers>=0.42",
        "transformers>=5.0",
        "peft>=0.18",
        "safetensors>=0.5",
        "accelerate>=1.0",
        "psutil>=5.9",
        "numpy>=2.0",
        "scipy>=1.13",
        "pillow>=10",
        "matplotlib>=3.9",
        "pydantic>=2.11",
        "pyyaml>=6",
        "rich>=13",
        "filelock>=3.30",
        "psutil>=5.9",
    ],
    extras_require={
        "gpu": [
            "triton>=3.5; platform_system == 'Linux'",
            "xformers>=0.0.35; platform_system == 'Linux'",  # earlier ones are for one version of torch each
            "bitsandbytes>=0.50",
            "nvidia-ml-py>=12",
        ],
        "fp8": ["torchao>=0.15"],
        "ocr": ["rapidocr>=3.10,<4", "onnxruntime>=1.20"],
        "log": ["tensorboard>=2.17", "wandb>=0.18"],
        "test": TEST,
    },
)

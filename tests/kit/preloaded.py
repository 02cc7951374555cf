"""What a training and its command import on their way, for a server that forks them: with it a training takes a second, not seven."""

from pipeline.tracking.writer import prepare_environment

prepare_environment()  # before MLflow is imported, as everywhere

import matplotlib.figure  # noqa: E402, F401  for the pictures of the end
import mlflow.artifacts  # noqa: E402
import mlflow.tracking  # noqa: E402, F401
import pandas  # noqa: E402, F401  pyarrow asks for it
import torch._dynamo  # noqa: E402, F401  and so does DistributedDataParallel

import pipeline.cli  # noqa: E402
import pipeline.runs.train  # noqa: E402, F401
import tests.kit.trainer  # noqa: E402, F401

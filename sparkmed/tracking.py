"""All of MLflow: runs, models, the registry and its champion. Only the driver speaks to it; executors get models from the lake."""

import contextlib
import json
import os
import pathlib
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

import mlflow  # noqa: E402
from mlflow import MlflowClient  # noqa: E402
from mlflow.data.dataset_source_registry import resolve_dataset_source  # noqa: E402
from mlflow.data.meta_dataset import MetaDataset  # noqa: E402
from mlflow.data.sources import LocalArtifactDatasetSource  # noqa: E402
from mlflow.exceptions import MlflowException  # noqa: E402

from sparkmed import storage  # noqa: E402
from sparkmed.config import Config  # noqa: E402
from sparkmed.learning import model as models  # noqa: E402
from sparkmed.learning.model import Model  # noqa: E402
from sparkmed.rejection import InputError  # noqa: E402

CHAMPION = "champion"
_LOADER = "sparkmed.learning.model"
_DIGEST = "sparkmed.model_digest"
_REGISTERED = re.compile(r"models:/([^/@]+)(?:@(.+)|/(\d+|latest))")


@dataclass(frozen=True)
class Registry:
    """MLflow at one tracking URI, for one experiment and one registered model."""

    uri: str
    experiment: str
    model: str
    artifacts: str | None = None
    """Where a new experiment keeps its files; None leaves it to the server."""

    @property
    def client(self) -> MlflowClient:
        return MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)

    def check(self):
        """Raise :class:`InputError` unless the store answers and can be written to: said before training, not after."""
        try:
            if self.uri.startswith("sqlite:///"):
                pathlib.Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
            elif self.uri.startswith("http"):  # a server that is not there would be retried for minutes
                _answers(self.uri)
            self._experiment_id()
            self.client.search_registered_models(max_results=1)
        except Exception as e:  # drivers of databases raise their own classes
            reason = " ".join(str(e).split())[:300]
            raise InputError(f"tracking.uri {_without_password(self.uri)} cannot be used from the driver: {reason}") from None

    def _experiment_id(self) -> str:
        found = self.client.get_experiment_by_name(self.experiment)
        if found is None:
            return self.client.create_experiment(self.experiment, artifact_location=self.artifacts)
        if found.lifecycle_stage != "active":
            raise InputError(
                f"experiment {self.experiment} is deleted in MLflow: restore it or name another in tracking.experiment"
            )
        return found.experiment_id

    @contextlib.contextmanager
    def run(self, name: str, parameters: Mapping[str, Any], tags: Mapping[str, str], dataset: Mapping[str, Any]) -> Iterator["Run"]:
        """A run with system metrics; it ends FAILED when the block raises."""
        mlflow.set_tracking_uri(self.uri)
        mlflow.set_registry_uri(self.uri)
        mlflow.set_system_metrics_sampling_interval(5)
        mlflow.set_system_metrics_samples_before_logging(1)
        with mlflow.start_run(
            experiment_id=self._experiment_id(), run_name=name, tags=dict(tags), log_system_metrics=True
        ) as active:
            run = Run(active.info.run_id, self)
            flat = _flat(parameters)
            for start in range(0, len(flat), 100):  # the store takes 100 at once
                mlflow.log_params(dict(list(flat.items())[start : start + 100]))
            local = storage.local_path(dataset["url"]) is not None
            where = LocalArtifactDatasetSource(dataset["url"]) if local else resolve_dataset_source(dataset["url"])
            source = MetaDataset(where, f"{dataset['name']}-{dataset['version']}", dataset["digest"])
            mlflow.log_input(source, context="training")
            mlflow.log_dict(dict(dataset), "dataset.json")
            yield run

    def trained(self, training: str) -> str | None:
        """The registered version that came out of the training with this digest, None if there is none."""
        found = self.client.search_model_versions(f"name='{self.model}'")
        versions = [str(v.version) for v in found if v.tags.get("sparkmed.training") == training]
        return max(versions, key=int) if versions else None

    def champion(self) -> str | None:
        """The version that the champion alias names, None without one."""
        return self.aliased(CHAMPION)

    def aliased(self, alias: str) -> str | None:
        """The version that an alias names, None without one."""
        try:
            return str(self.client.get_model_version_by_alias(self.model, alias).version)
        except MlflowException as e:
            if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):  # no such model, no such alias
                return None
            raise  # a store that does not answer is no proof that there is no champion

    def latest(self) -> str | None:
        """The version registered last, None without any."""
        versions = self.versions()
        return max(versions, key=int) if versions else None

    def versions(self) -> set[str]:
        return {str(v.version) for v in self.client.search_model_versions(f"name='{self.model}'")}

    def crown(self, version: str, reason: str):
        """Move the champion alias, and write the reason on the version."""
        self.client.set_registered_model_alias(self.model, CHAMPION, version)
        self.note(version, "sparkmed.promotion", reason)

    def note(self, version: str, key: str, value: str):
        self.client.set_model_version_tag(self.model, version, key, value[:5000])

    def version_facts(self, version: str) -> dict[str, str]:
        found = self.client.get_model_version(self.model, version)
        return {"name": found.name, "version": str(found.version), "run_id": found.run_id, **found.tags}

    def digest(self, version: str) -> str:
        """The digest of the model when it was registered; "" of a version that does not say."""
        return self.version_facts(version).get(_DIGEST, "")

    def fetch(self, version: str, lake: str) -> str:
        """URL of the model folder of a version in the lake, copied there once: executors need no MLflow.

        Raises :class:`InputError` when the copy, or what the registry has now, is not what was registered.
        """
        url, digest = storage.join(lake, "models", storage.component(self.model), version), self.digest(version)
        if storage.exists(storage.join(url, models.SPEC)):
            try:
                models.read_spec(url, digest)
            except InputError as e:
                raise InputError(f"{e}. Version {version} of {self.model} is another model in the registry: remove {url}") from None
        else:
            with tempfile.TemporaryDirectory() as folder:
                models.copy(str(_download(f"models:/{self.model}/{version}", self.uri, folder)), url, digest)
        return url

    def curves(self, run_id: str) -> dict[str, list[tuple[int, float]]]:
        """Per metric of a run its (epoch, value) points; system metrics left out."""
        names = [k for k in self.client.get_run(run_id).data.metrics if not k.startswith("system/")]
        return {
            k: [(m.step, m.value) for m in sorted(self.client.get_metric_history(run_id, k), key=lambda m: m.step)] for k in names
        }


@dataclass(frozen=True)
class Run:
    """An active run."""

    id: str
    registry: Registry

    def metrics(self, values: Mapping[str, float], step: int | None = None):
        mlflow.log_metrics({k: float(v) for k, v in values.items() if v is not None}, step=step, run_id=self.id)

    def file(self, data: bytes, name: str):
        path = pathlib.PurePosixPath(name)
        with tempfile.TemporaryDirectory() as folder:
            target = pathlib.Path(folder) / path.name
            target.write_bytes(data)
            mlflow.log_artifact(str(target), None if str(path.parent) == "." else str(path.parent))

    def register(self, folder: str, tags: Mapping[str, str]) -> str:
        """Log the model folder (safetensors weights and a JSON spec, also of a first model) and register it; the version.

        ``mlflow.pyfunc`` loads it as well, without a pickle: the entry point is a module of this package.
        """
        with tempfile.TemporaryDirectory() as scratch:
            data = pathlib.Path(scratch) / "network"
            models.copy(folder, str(data))
            info = mlflow.pyfunc.log_model(
                name="model",
                loader_module=_LOADER,
                data_path=str(data),
                pip_requirements=_requirements(),
                metadata={"spec": json.loads((data / models.SPEC).read_text())},
                model_config={"imports": []},
                registered_model_name=self.registry.model,
            )
        version = str(info.registered_model_version)
        for key, value in {**tags, _DIGEST: models.model_digest(folder)}.items():
            self.registry.note(version, key, value)
        return version


def of(config: Config) -> Registry:
    """The registry that a config names; SQLite inside a local lake by default."""
    uri, artifacts = config.tracking.uri, None
    if uri is None:
        lake = storage.local_path(config.lake)
        if lake is None:
            raise InputError(f"lake {config.lake} is remote and SQLite cannot live there: name an MLflow server in tracking.uri")
        uri, artifacts = f"sqlite:///{lake / 'mlflow.db'}", f"{storage.absolute(config.lake)}/mlartifacts"
    return Registry(uri, config.tracking.experiment or config.name, config.tracking.model or config.name, artifacts)


def load_model(uri: str, tracking_uri: str | None = None, device: str = "auto", imports: Sequence[str] = ()) -> Model:
    """The model at ``models:/name@alias``, ``models:/name/version``, ``runs:/...``, or in a folder.

    ``model.predict(volume)`` gives a label Volume on the input's own grid, or class probabilities. Weights are read from
    safetensors and checked against the digest in the spec; nothing is unpickled. Networks are MONAI's, or below ``imports``.
    """
    with located(uri, tracking_uri) as (_, folder):
        return Model.load(folder, device, imports)


@contextlib.contextmanager
def located(uri: str, tracking_uri: str | None = None) -> Iterator[tuple[str, str]]:
    """What the model at ``uri`` is called for good, an alias being the version that it names now, and a folder or URL with it.

    Raises :class:`InputError` when there is none, or a version that is not what was registered.
    """
    if not uri.startswith(("models:", "runs:", "mlflow-artifacts:")):
        yield storage.absolute(uri), uri
        return
    digest = ""
    if match := _REGISTERED.fullmatch(uri):
        registry, alias, version = Registry(tracking_uri or mlflow.get_tracking_uri(), "", match[1]), match[2], match[3]
        try:
            version = registry.aliased(alias) if alias else registry.latest() if version == "latest" else version
            if version is None:
                raise InputError(f"{uri}: the registry has no such model or alias")
            digest = registry.digest(version)
        except MlflowException as e:
            raise InputError(f"{uri}: {' '.join(str(e).split())[:300]}") from None
        uri = f"models:/{match[1]}/{version}"
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(_download(uri, tracking_uri, scratch))
        models.read_spec(folder, digest)
        yield uri, folder


def _download(uri: str, tracking_uri: str | None, folder: str) -> pathlib.Path:
    before = mlflow.get_tracking_uri(), mlflow.get_registry_uri()
    try:
        if tracking_uri:
            mlflow.set_registry_uri(tracking_uri)
        path = mlflow.artifacts.download_artifacts(artifact_uri=uri, dst_path=folder, tracking_uri=tracking_uri)
    except MlflowException as e:
        raise InputError(f"{uri}: {' '.join(str(e).split())[:300]}") from None
    finally:
        mlflow.set_registry_uri(before[1])
    found = sorted(pathlib.Path(path).rglob(models.SPEC), key=lambda p: len(p.parts))  # those below it are parts of it
    if not found:
        raise InputError(f"{uri} is not a sparkmed model: it holds no {models.SPEC}")
    return found[0].parent


def _answers(uri: str):
    import urllib.error
    import urllib.request

    try:
        urllib.request.urlopen(uri.rstrip("/") + "/health", timeout=10).read()
    except urllib.error.HTTPError:
        return  # a server that wants a login, or another route: MLflow's own client says more


def _without_password(uri: str) -> str:
    scheme, separator, rest = uri.partition("://")
    return f"{scheme}{separator}{rest.rpartition('@')[2]}"


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as dotted names, each at most 6000 characters."""
    out = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        out |= _flat(value, f"{name}.") if isinstance(value, Mapping) else {name: str(value)[:6000]}
    return out


def _requirements() -> Sequence[str]:
    names = ("torch", "monai", "numpy", "scipy", "nibabel", "pydicom", "safetensors", "pydantic", "fsspec")
    pins = []
    for name in names:
        with contextlib.suppress(PackageNotFoundError):
            pins.append(f"{name}=={package_version(name).partition('+')[0]}")
    return [f"sparkmed=={package_version('sparkmed')}", *pins]

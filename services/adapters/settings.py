"""Every environment variable of the platform: type, default, unit and meaning; one frozen class a process.

Only `__main__` modules call :func:`load_or_exit`, once; everything else receives values. Making a settings object
by hand (tests, the launcher) reads no environment. The table in `docs/settings.md` is what :func:`render_table`
writes: `python -m services.adapters.settings > docs/settings.md`.
"""

import os
import re
import sys
from collections.abc import Mapping
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, SecretStr, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

PREFIX = "LIKENESS_"
FILE_SUFFIX = "_FILE"
"""Ends the name of a variable that names a file with the value: secrets need not stand in the environment."""

CONFIGURATION_FAULT = 78
"""Exit status of a process whose settings are wrong (EX_CONFIG of sysexits.h)."""

EMBEDDED_MODEL = "pocket"
"""The base model that the embedded platform makes for itself: the default, and the name of its folder."""

EMBEDDED_NATS_ADDR = "127.0.0.1:8104"
"""Where the launcher's own nats-server listens unless told otherwise."""

EMBEDDED_NATS_MONITOR_ADDR = "127.0.0.1:8105"
"""Where it answers its monitor."""

EXAMPLES_HOST = "127.77.0.1"
"""Loopback address on which nothing but the example pictures is served."""

S = TypeVar("S", bound="CommonSettings")


class SettingsError(Exception):
    """All faults of the environment, one sentence each."""

    def __init__(self, faults: list[str]) -> None:
        super().__init__("\n".join(faults))
        self.faults = faults


def _checked_address(text: str) -> str:
    host, _, port = text.rpartition(":")
    if not host or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise ValueError("must be host:port with a port from 0 to 65535")
    return text


def _networks(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(ip_network(part.strip(), strict=False) for part in value.split(",") if part.strip())


def _number(value: object) -> object:
    return int(value) if isinstance(value, str) and value.isdecimal() else value


def _checked_artifacts(text: str) -> str:
    if text and not re.fullmatch(r"folder:.+|s3:https?://[^/?#\s@]+/[^/?#\s]+/?", text):
        raise ValueError("must be folder:PATH or s3:http(s)://HOST/BUCKET")
    return text.rstrip("/") if text.startswith("s3:") else text


def _checked_colour(value: str) -> str:
    if re.fullmatch("#[0-9a-fA-F]{6}", value) is None:
        raise ValueError("must be a colour like #ffffff")
    return value


def _checked_url(text: str) -> str:
    if text and not re.fullmatch(r"https?://[^/?#\s]+[^?#\s]*", text):
        raise ValueError("must be an http or https URL without query")
    return text.rstrip("/")


def _words(value: object) -> object:
    if not isinstance(value, str):
        return value
    return tuple(part.strip() for part in value.split(",") if part.strip())


Address = Annotated[str, AfterValidator(_checked_address)]
Origins = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_words)]
Networks = Annotated[tuple[IPv4Network | IPv6Network, ...], NoDecode, BeforeValidator(_networks)]
ArtifactsPlace = Annotated[str, AfterValidator(_checked_artifacts)]
Replicas = Annotated[Literal[1, 3], BeforeValidator(_number)]
Url = Annotated[str, AfterValidator(_checked_url)]
Colour = Annotated[str, AfterValidator(_checked_colour)]


def setting(default: Any, meaning: str, *, unit: str = "", **limits: Any) -> Any:
    """One variable: its default, its sentence, and its unit if it has one.

    Args:
        default: value when the variable is not set.
        meaning: what it decides, as a sentence.
        unit: unit of a number, for the table.
        limits: `ge`, `gt`, `le`, `lt` as pydantic spells them.

    Returns:
        A pydantic field.
    """
    return Field(default=default, description=meaning, json_schema_extra={"unit": unit}, **limits)


class CommonSettings(BaseSettings):
    """What every process reads."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", validate_default=True)
    process: ClassVar[str] = ""

    home: Path = setting(Path(".likeness"), "Data folder of the embedded platform.")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = setting(
        "INFO", "Least severe log lines that are written: DEBUG, INFO, WARNING or ERROR."
    )
    log_format: Literal["auto", "json", "text"] = setting(
        "auto", "Log lines as JSON or as plain text; auto: text on a terminal, JSON elsewhere."
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Leaves the arguments as the only source; :func:`load` turns the environment into arguments."""
        return (init_settings,)


class ServerSettings(CommonSettings):
    """What every long-running process reads."""

    grace_s: float = setting(
        20.0, "Time that calls and jobs get to end after SIGTERM before they are cut off.", unit="s", ge=0
    )
    ready_fd: int | None = setting(
        None, "Number of an open file that gets a line once the process serves; set by the launcher.", ge=3
    )


class NatsSettings(CommonSettings):
    """Where the job log is."""

    nats_url: str = setting(
        "",
        "Address of the job log; empty: the launcher starts its own nats-server, and a service that is "
        f"started alone looks for it at nats://{EMBEDDED_NATS_ADDR}.",
    )
    nats_replicas: Replicas = setting(1, "Copies of each stream: 1, or 3 on a cluster of servers.")
    nats_monitor_url: Url = setting(
        f"http://{EMBEDDED_NATS_MONITOR_ADDR}",
        "Monitor of the one nats-server, asked at start whether it syncs every write to disk.",
    )
    nats_system_url: str = setting(
        "", "For a cluster, in place of the monitor: its addresses with a user of the system account."
    )

    @property
    def nats_servers(self) -> list[str]:
        """Addresses to connect to."""
        return [part.strip() for part in (self.nats_url or f"nats://{EMBEDDED_NATS_ADDR}").split(",")]

    @property
    def nats_system_servers(self) -> list[str]:
        """Addresses with a user of the system account; none without a cluster."""
        return [part.strip() for part in self.nats_system_url.split(",") if part.strip()]


class StorageAddress(CommonSettings):
    """Where to find storage."""

    storage_addr: Address = setting("127.0.0.1:8103", "StorageService and AccessService (gRPC).")


class TrainingAddress(CommonSettings):
    """Where to find the trainer api."""

    training_addr: Address = setting("127.0.0.1:8101", "TrainingService and its WorkerService (gRPC).")


class InferenceAddress(CommonSettings):
    """Where to find the inference api."""

    inference_addr: Address = setting("127.0.0.1:8102", "InferenceService and its WorkerService (gRPC).")


class EgressSettings(CommonSettings):
    """What addresses that users name may point to."""

    egress_allow: Networks = setting(
        (),
        "Address ranges, comma separated, that downloads and webhooks may reach although they are private.",
    )


class BaseModelSettings(CommonSettings):
    """Which model is meant when a request names none."""

    base_model: str = setting(EMBEDDED_MODEL, "Base model of requests that name none.")


class LeaseSettings(CommonSettings):
    """When a silent worker loses its jobs."""

    lease_s: float = setting(
        30.0, "A job that its worker has not named for so long is given to another worker.", unit="s", gt=0
    )


class WorkerSettings(ServerSettings, StorageAddress):
    """What both kinds of workers read."""

    worker_health_addr: Address = setting(
        "127.0.0.1:0", "Where a worker answers health checks (gRPC); port 0 takes any free one."
    )
    beat_s: float = setting(5.0, "Time between two signs of life of a worker.", unit="s", gt=0)
    device: str = setting("auto", "Device that computes: auto, cpu, cuda or cuda:N.")
    cpu_threads: int = setting(
        0, "Threads that compute on a CPU; 0: half of the cores, at least one.", ge=0, le=1024
    )
    cache: Path | None = setting(
        None, "Folder of models that a worker has fetched; default: cache under LIKENESS_HOME."
    )
    cache_bytes: int = setting(
        20 * 1024**3,
        "Size to which a worker's cache may grow before old models leave it.",
        unit="bytes",
        gt=0,
    )

    @property
    def cache_path(self) -> Path:
        """The folder that :attr:`cache` names, or its default."""
        return self.cache or self.home / "cache"


class GatewaySettings(
    ServerSettings,
    NatsSettings,
    StorageAddress,
    TrainingAddress,
    InferenceAddress,
    EgressSettings,
    BaseModelSettings,
):
    """The HTTP edge."""

    process: ClassVar[str] = "gateway"

    http_addr: Address = setting("127.0.0.1:8000", "Where the gateway listens (HTTP).")
    public_url: Url = setting("", "Base of the URLs handed out; empty: the request's own host.")
    cors_origins: Origins = setting(
        (), "Origins of web pages, comma separated, that may call the API from a browser."
    )
    webhook_secret: SecretStr = setting(
        SecretStr(""), "Key of the HMAC-SHA256 signature that webhooks carry; empty: they carry none."
    )
    sdapi_strict: bool = setting(
        False, "Errors of the stablediffusionapi dialect have HTTP statuses of their own instead of 200."
    )
    sdapi_cors: bool = setting(
        True, "Any web page may call the stablediffusionapi dialect and read pictures from a browser."
    )
    sdapi_jobs_at_once: int = setting(
        10,
        "Trainings, and drawings, that a project may have under way through the stablediffusionapi dialect.",
        ge=1,
        le=200,
    )
    sdapi_sandbox_steps: int = setting(
        200, "Most updates of a training in the sandbox of the stablediffusionapi dialect.", ge=1, le=2000
    )
    sdapi_sync_wait_s: float = setting(
        50.0,
        "How long the stablediffusionapi dialect holds a request for pictures before it says where to ask again.",
        unit="s",
        ge=0,
    )


class TrainerApiSettings(
    ServerSettings,
    NatsSettings,
    StorageAddress,
    TrainingAddress,
    InferenceAddress,
    BaseModelSettings,
    LeaseSettings,
):
    """The trainer api."""

    process: ClassVar[str] = "trainer api"


class TrainerWorkerSettings(WorkerSettings, TrainingAddress):
    """The trainer worker."""

    process: ClassVar[str] = "trainer worker"

    checkpoint_s: float = setting(
        60.0, "Time between two recovery checkpoints of a training.", unit="s", gt=0
    )
    one_job_within_s: float = setting(
        0.0,
        "Above 0, the worker ends after one training, or when none came within this time: one process a training.",
        unit="s",
        ge=0,
    )


class InferenceApiSettings(
    ServerSettings, NatsSettings, StorageAddress, InferenceAddress, BaseModelSettings, LeaseSettings
):
    """The inference api."""

    process: ClassVar[str] = "inference api"


class InferenceWorkerSettings(WorkerSettings, InferenceAddress):
    """The inference worker."""

    process: ClassVar[str] = "inference worker"

    batch_cap: int = setting(
        1,
        "Pictures in one call of the network; above 1 a picture depends on its neighbours in the last bits.",
        ge=1,
        le=64,
    )
    model_memory_bytes: int = setting(
        0,
        "Weights that stay loaded; 0: 60 % of the device's memory, 8 GiB on a CPU.",
        unit="bytes",
        ge=0,
    )
    adapter_memory_bytes: int = setting(
        1 << 30,
        "Parsed LoRAs that stay in the machine's memory, so that they are not read anew.",
        unit="bytes",
        ge=0,
    )


class S3Settings(CommonSettings):
    """How storage uses a bucket; nothing of it is read while artifacts lie in a folder."""

    s3_access_key: SecretStr = setting(SecretStr(""), "Access key of the bucket.")
    s3_secret_key: SecretStr = setting(SecretStr(""), "Secret key of the bucket.")
    s3_region: str = setting("us-east-1", "Region of the bucket; most stores beside AWS take any.")
    s3_encryption: Literal["", "AES256", "aws:kms"] = setting(
        "",
        "Encryption that the store is told to keep objects under: AES256 or aws:kms; empty: its own choice.",
    )
    s3_encryption_key: str = setting(
        "", "For aws:kms, the name of the key; empty: the store's default key for it."
    )
    s3_direct_bytes: int = setting(
        8 << 20,
        "Blobs from this size on are read and written by the workers straight in the bucket, by addresses that storage "
        "signs, where they can reach it under the name in LIKENESS_ARTIFACTS; 0: all bytes go through storage.",
        unit="bytes",
        ge=0,
    )
    s3_part_bytes: int = setting(
        16 << 20,
        "Files above this go into the bucket in parts of this size, four at once.",
        unit="bytes",
        ge=5 << 20,
        le=5 << 30,
    )
    s3_orphan_s: float = setting(
        86_400.0, "Uploads into the bucket that are unfinished for so long are removed.", unit="s", gt=0
    )


class StorageSettings(ServerSettings, StorageAddress, EgressSettings, BaseModelSettings, S3Settings):
    """Storage."""

    process: ClassVar[str] = "storage"

    artifacts: ArtifactsPlace = setting(
        "",
        "Where blobs and manifests are kept: folder:PATH, or s3:http(s)://HOST/BUCKET; "
        "empty: artifacts under LIKENESS_HOME.",
    )
    models: Path | None = setting(
        None, "TOML catalogue of base models; default: only the one that ships, pocket."
    )
    bootstrap_key_file: Path | None = setting(
        None, "File that holds the key of a development project; made, mode 0600, where it is missing."
    )
    max_archive_bytes: int = setting(
        2 << 30, "Largest archive of pictures that is fetched.", unit="bytes", gt=0
    )
    max_model_bytes: int = setting(
        16 << 30,
        "Largest model that is fetched from an address that a training names, as it comes and unpacked.",
        unit="bytes",
        gt=0,
    )
    max_archive_files: int = setting(20_000, "Most files that an archive may hold.", gt=0)
    max_archive_ratio: float = setting(
        200.0, "How many times its size an archive of more than 64 MiB may unpack to.", ge=1
    )
    max_unpacked_bytes: int = setting(
        8 << 30, "Most that the files of an archive may unpack to.", unit="bytes", gt=0
    )
    max_image_pixels: int = setting(
        100_000_000,
        "Pictures with more pixels are skipped; the decoder's memory, 3 GiB, is meant for the default.",
        unit="pixels",
        gt=0,
    )
    alpha_background: Colour = setting(
        "#ffffff", "Colour that shows through the transparent parts of pictures, as #rrggbb."
    )

    @property
    def s3_address(self) -> tuple[str, str] | None:
        """Endpoint and bucket that :attr:`artifacts` names; None when it names a folder."""
        if not self.artifacts.startswith("s3:"):
            return None
        endpoint, _, bucket = self.artifacts.removeprefix("s3:").rpartition("/")
        return endpoint, bucket

    @property
    def artifacts_path(self) -> Path:
        """The folder that :attr:`artifacts` names, or its default."""
        return Path(self.artifacts.removeprefix("folder:")) if self.artifacts else self.home / "artifacts"


class LauncherSettings(GatewaySettings):
    """The launcher; it hands each value on to the services that read it."""

    process: ClassVar[str] = "launcher"

    nats_addr: Address = setting(EMBEDDED_NATS_ADDR, "Where the launcher's own nats-server listens.")
    nats_monitor_addr: Address = setting(
        EMBEDDED_NATS_MONITOR_ADDR, "Where the launcher's own nats-server answers its monitor (HTTP)."
    )
    examples_addr: Address | None = setting(
        None,
        "Where the launcher serves the bundled example pictures (HTTP), for jobs to fetch: a loopback address of "
        "its own, since it is the one private address that the embedded storage may reach without being told. "
        f"Default: {EXAMPLES_HOST} with the port of LIKENESS_NATS_MONITOR_ADDR.",
    )

    @property
    def examples_address(self) -> str:
        """The address that :attr:`examples_addr` names, or its default."""
        return self.examples_addr or f"{EXAMPLES_HOST}:{self.nats_monitor_addr.rpartition(':')[2]}"


class CliSettings(CommonSettings):
    """The `likeness` command."""

    process: ClassVar[str] = "cli"

    url: Url = setting("http://127.0.0.1:8000", "The gateway that the command line speaks to.")
    api_key: SecretStr = setting(
        SecretStr(""), "API key; empty: the one in the file api-key under LIKENESS_HOME."
    )


class BenchSettings(CommonSettings):
    """The benchmark and the picture-quality table."""

    process: ClassVar[str] = "bench"

    diffusers: Path | None = setting(None, "Path of a diffusers checkout, the peer to compare with.")


PROCESSES: tuple[type[CommonSettings], ...] = (
    GatewaySettings,
    TrainerApiSettings,
    TrainerWorkerSettings,
    InferenceApiSettings,
    InferenceWorkerSettings,
    StorageSettings,
    LauncherSettings,
    CliSettings,
    BenchSettings,
)


def variables() -> dict[str, tuple[FieldInfo, list[str]]]:
    """Every variable, in order of its name, with its field and the processes that read it."""
    known: dict[str, tuple[FieldInfo, list[str]]] = {}
    for cls in PROCESSES:
        for name, field in cls.model_fields.items():
            known.setdefault(PREFIX + name.upper(), (field, []))[1].append(cls.process)
    return dict(sorted(known.items()))


def load(cls: type[S], environ: Mapping[str, str]) -> S:
    """Reads one process's settings.

    Args:
        cls: the process's class.
        environ: environment variables.

    Returns:
        The settings.

    Raises:
        SettingsError: with every wrong value and every unknown `LIKENESS_` variable.
    """
    source = EnvSettingsSource(cls, env_ignore_empty=True)
    environ, faults = _with_files(environ)
    source.env_vars = {name.lower(): value for name, value in environ.items() if value != ""}
    faults += _unknown(environ)
    try:
        settings = cls(**source())
    except ValidationError as error:
        faults = _wrong(error) + faults
    if faults:
        raise SettingsError(faults)
    return settings


def _with_files(environ: Mapping[str, str]) -> tuple[dict[str, str], list[str]]:
    """Reads the values that are given as files (`LIKENESS_NATS_URL_FILE`); returns the variables and the faults."""
    known, values, faults = variables(), dict(environ), []
    for given in sorted(name for name in environ if name.startswith(PREFIX) and name.endswith(FILE_SUFFIX)):
        name = given.removesuffix(FILE_SUFFIX)
        if given in known or name not in known:
            continue
        path = values.pop(given)
        if values.get(name):
            faults.append(f"{given}: {name} is set too; one of them must go")
            continue
        try:
            values[name] = Path(path).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            faults.append(f"{given}: {path} cannot be read ({error.__class__.__name__})")
    return values, faults


def _unknown(environ: Mapping[str, str]) -> list[str]:
    known = variables()
    names = sorted(name for name in environ if name.startswith(PREFIX) and name not in known)
    return [f"{name}: no such setting" for name in names]


def _wrong(error: ValidationError) -> list[str]:
    """One sentence a variable; the value stays out of it, since it may be a secret."""
    faults: dict[str, str] = {}
    for detail in error.errors(include_input=False, include_url=False):
        name = PREFIX + str(detail["loc"][0]).upper()
        faults.setdefault(name, f"{name}: {detail['msg'].removeprefix('Value error, ')}")
    return list(faults.values())


def load_or_exit(cls: type[S], environ: Mapping[str, str] | None = None) -> S:
    """Reads one process's settings from the environment, or ends the process saying what is wrong.

    Args:
        cls: the process's class.
        environ: environment variables; the process's own by default.

    Returns:
        The settings.
    """
    try:
        return load(cls, os.environ if environ is None else environ)
    except SettingsError as error:
        _exit_with(error.faults)


def _exit_with(faults: list[str]) -> NoReturn:
    sys.stderr.write("wrong settings:\n" + "".join(f"  {fault}\n" for fault in faults))
    raise SystemExit(CONFIGURATION_FAULT)


def to_environ(settings: CommonSettings) -> dict[str, str]:
    """Writes settings as environment variables, for a process that is to be started with them.

    Args:
        settings: any process's settings.

    Returns:
        Variables whose values :func:`load` reads back as the same settings; unset ones are left out.
    """
    values = {name: getattr(settings, name) for name in type(settings).model_fields}
    return {
        PREFIX + name.upper(): _text(value) for name, value in values.items() if value not in (None, "", ())
    }


def _text(value: object) -> str:
    if isinstance(value, SecretStr):
        return value.get_secret_value()
    if isinstance(value, tuple):
        return ",".join(str(part) for part in value)
    return str(value)


def render_table() -> str:
    """The settings page of the documentation, as Markdown."""
    lines = [
        "# Settings",
        "",
        "Every setting is an environment variable. An unknown `LIKENESS_` variable, or a wrong value, keeps a",
        "process from starting; all faults are reported together. With `_FILE` behind its name a variable names a",
        "file that holds the value (`LIKENESS_NATS_URL_FILE=/run/secrets/nats-url`), white space around it left out.",
        "This page is generated: `python -m services.adapters.settings > docs/settings.md`.",
        "",
        "| variable | default | unit | read by | meaning |",
        "|---|---|---|---|---|",
    ]
    lines += [_row(name, field, processes) for name, (field, processes) in variables().items()]
    return "\n".join(lines) + "\n"


def _row(name: str, field: FieldInfo, processes: list[str]) -> str:
    extra = field.json_schema_extra
    unit = extra.get("unit", "") if isinstance(extra, dict) else ""
    default = "" if field.default is None else _text(field.default)
    readers = "all" if len(processes) == len(PROCESSES) else ", ".join(processes)
    return f"| `{name}` | {f'`{default}`' if default else '(unset)'} | {unit} | {readers} | {field.description} |"


if __name__ == "__main__":
    sys.stdout.write(render_table())

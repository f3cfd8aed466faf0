"""Settings: types, defaults, faults all at once, and the generated page."""

from ipaddress import ip_network
from pathlib import Path

import pytest

from services.adapters import settings


def test_defaults_are_the_documented_addresses() -> None:
    gateway = settings.load(settings.GatewaySettings, {})
    assert gateway.http_addr == "127.0.0.1:8000"
    assert (gateway.training_addr, gateway.inference_addr, gateway.storage_addr) == (
        "127.0.0.1:8101",
        "127.0.0.1:8102",
        "127.0.0.1:8103",
    )
    assert gateway.nats_servers == ["nats://127.0.0.1:8104"]


def test_values_come_from_the_environment_with_their_types() -> None:
    environ = {
        "LIKENESS_EGRESS_ALLOW": "127.0.0.0/8, ::1/128",
        "LIKENESS_HOME": "/data",
        "LIKENESS_ARTIFACTS": "folder:/blobs",
    }
    storage = settings.load(settings.StorageSettings, environ)
    assert storage.egress_allow == (ip_network("127.0.0.0/8"), ip_network("::1/128"))
    assert storage.artifacts_path == Path("/blobs")
    assert storage.home == Path("/data")


def test_an_address_range_that_is_none_is_named() -> None:
    with pytest.raises(settings.SettingsError, match=r"LIKENESS_EGRESS_ALLOW: .*no-network"):
        settings.load(settings.StorageSettings, {"LIKENESS_EGRESS_ALLOW": "10.0.0.0/8,no-network"})


def test_an_empty_variable_means_its_default() -> None:
    assert settings.load(settings.TrainerWorkerSettings, {"LIKENESS_BEAT_S": ""}).beat_s == 5.0


def test_all_faults_are_reported_together() -> None:
    environ = {
        "LIKENESS_BEAT_S": "-1",
        "LIKENESS_STORAGE_ADDR": "nowhere",
        "LIKENESS_BEATS": "5",
        "PATH": "/bin",
    }
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(settings.TrainerWorkerSettings, environ)
    assert caught.value.faults == [
        "LIKENESS_STORAGE_ADDR: must be host:port with a port from 0 to 65535",
        "LIKENESS_BEAT_S: Input should be greater than 0",
        "LIKENESS_BEATS: no such setting",
    ]


def test_a_variable_of_another_process_is_known() -> None:
    assert settings.load(settings.StorageSettings, {"LIKENESS_HTTP_ADDR": "127.0.0.1:1"}).process == "storage"


def test_a_wrong_environment_ends_the_process_and_names_each_fault(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        settings.load_or_exit(settings.GatewaySettings, {"LIKENESS_GRACE_S": "soon", "LIKENESS_NO": "1"})
    assert caught.value.code == settings.CONFIGURATION_FAULT
    text = capsys.readouterr().err
    assert "LIKENESS_GRACE_S" in text
    assert "LIKENESS_NO" in text


def test_a_secret_is_shown_in_no_text() -> None:
    cli = settings.load(settings.CliSettings, {"LIKENESS_API_KEY": "canary"})
    assert "canary" not in repr(cli)
    assert cli.api_key.get_secret_value() == "canary"


@pytest.mark.parametrize("cls", settings.PROCESSES, ids=lambda cls: cls.process)
def test_settings_survive_the_way_through_an_environment(cls: type[settings.CommonSettings]) -> None:
    given = settings.load(cls, {"LIKENESS_EGRESS_ALLOW": "127.0.0.0/8,10.0.0.0/8", "LIKENESS_HOME": "/x"})
    assert settings.load(cls, settings.to_environ(given)) == given


def test_making_settings_by_hand_reads_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIKENESS_BASE_MODEL", "other")
    assert settings.GatewaySettings().base_model == "pocket"


def test_every_setting_has_a_sentence() -> None:
    for name, (field, _) in settings.variables().items():
        assert (field.description or "").endswith("."), name


def test_the_settings_page_is_current() -> None:
    page = Path(__file__).parents[3] / "docs" / "settings.md"
    assert page.read_text() == settings.render_table()


def test_a_value_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "nats-url"
    secret.write_text("nats://gateway:secret@nats:4222\n")
    gateway = settings.load(settings.GatewaySettings, {"LIKENESS_NATS_URL_FILE": str(secret)})
    assert gateway.nats_url == "nats://gateway:secret@nats:4222"


def test_a_file_that_is_missing_or_given_beside_the_value_is_a_fault(tmp_path: Path) -> None:
    environ = {
        "LIKENESS_NATS_URL_FILE": str(tmp_path / "none"),
        "LIKENESS_PUBLIC_URL": "https://a.example",
        "LIKENESS_PUBLIC_URL_FILE": str(tmp_path / "url"),
        "LIKENESS_NO_SUCH_FILE": "x",
    }
    with pytest.raises(settings.SettingsError) as caught:
        settings.load(settings.GatewaySettings, environ)
    assert caught.value.faults == [
        f"LIKENESS_NATS_URL_FILE: {tmp_path / 'none'} cannot be read (FileNotFoundError)",
        "LIKENESS_PUBLIC_URL_FILE: LIKENESS_PUBLIC_URL is set too; one of them must go",
        "LIKENESS_NO_SUCH_FILE: no such setting",
    ]

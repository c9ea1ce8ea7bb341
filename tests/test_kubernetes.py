"""deploy/kubernetes: composed by kustomize, judged by the API's schemas, and by the server that is to read it."""

import base64
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from mmubusd.rpc.config import ConfigError, Settings, load
from mmubusd.rpc.server import LIVENESS
from source_tree import ROOT

KUBERNETES = ROOT / "deploy" / "kubernetes"
TOOLS = Path(sys.executable).parent
OVERLAYS = ("trusted-network", "tls")
SECRETS = [f"{name}.{kind}" for name in ("server", "application", "hmm", "rdma") for kind in ("crt", "key")]
STOP_S = 2.0
"""Beyond preStop and drain_s, as docs/operate.md says."""

Document = dict[str, Any]


def kustomize() -> list[str]:
    """The command that composes; the test is skipped where there is none."""
    if found := shutil.which("kustomize"):
        return [found, "build"]
    if found := shutil.which("kubectl"):
        return [found, "kustomize"]
    pytest.skip("neither kustomize nor kubectl is installed; the manifests themselves are checked one by one")


def compose(tree: Path, directory: str) -> list[Document]:
    done = subprocess.run([*kustomize(), str(tree / directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The manifests, with the secrets that a user puts there."""
    tree = tmp_path_factory.mktemp("kubernetes") / "kubernetes"
    shutil.copytree(KUBERNETES, tree)
    for name in ("ca.crt", *SECRETS):
        (tree / "overlays/tls/secrets" / name).write_text(f"{name}\n")
    return tree


@pytest.fixture(scope="module", params=OVERLAYS)
def overlay(request: pytest.FixtureRequest, tree: Path) -> list[Document]:
    return compose(tree, f"overlays/{request.param}")


def one(documents: list[Document], kind: str, name: str = "mmubus") -> Document:
    (found,) = [
        d for d in documents if d["kind"] == kind and re.fullmatch(rf"{name}(-\w{{10}})?", d["metadata"]["name"])
    ]
    return found


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in documents:
        if document["kind"] in ("StatefulSet", "Deployment"):
            yield document["metadata"]["name"], document["spec"]["template"]["spec"]


def check(document: Document) -> None:
    """Raises: ValidationError. The Prometheus operator's kinds are not the API's: see the test of the monitor."""
    if not document["apiVersion"].startswith("monitoring.coreos.com/"):
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_every_manifest_is_valid_by_itself() -> None:
    whole = [*KUBERNETES.glob("base/*.yaml"), *KUBERNETES.glob("components/example/*.yaml")]
    whole += KUBERNETES.glob("components/monitoring/*.yaml")
    documents = [one for path in whole for one in yaml.safe_load_all(path.read_text())]
    documents = [document for document in documents if "kustomize" not in document["apiVersion"]]
    assert len(documents) > 8
    for document in documents:
        check(document)


def test_every_composed_document_is_valid(overlay: list[Document]) -> None:
    kinds = {document["kind"] for document in overlay}
    assert kinds >= {"Namespace", "StatefulSet", "Service", "PodDisruptionBudget", "NetworkPolicy", "ConfigMap"}
    for document in overlay:
        check(document)
        assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "mmubus"


def test_the_schemas_find_what_is_wrong(overlay: list[Document]) -> None:
    budget = one(overlay, "PodDisruptionBudget")
    with pytest.raises(kubernetes_validate.ValidationError, match="maxUnavailble"):
        check({**budget, "spec": {**budget["spec"], "maxUnavailble": 1}})


def test_the_state_is_on_a_claim_of_its_own(tree: Path, tmp_path: Path) -> None:
    overlay = shutil.copytree(tree, tmp_path / "kubernetes") / "overlays" / "trusted-network" / "kustomization.yaml"
    text = overlay.read_text()
    overlay.write_text(text.replace("components:\n", "components:\n  - ../../components/state\n"))
    documents = compose(tmp_path / "kubernetes", "overlays/trusted-network")
    server = one(documents, "StatefulSet")
    check(server)
    (claim,) = server["spec"]["volumeClaimTemplates"]
    container = server["spec"]["template"]["spec"]["containers"][0]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    state = settings_of(documents, tmp_path).state
    assert state is not None
    assert str(state).startswith(f"{mounts[claim['metadata']['name']]}/")
    assert mounts.keys() >= {"config", "run", "tmp"}, "what was there is still there"


def settings_of(documents: list[Document], directory: Path) -> Settings:
    """What the server makes of the config map and the environment of its container. Raises: ConfigError."""
    (directory / "mmubusd.toml").write_text(one(documents, "ConfigMap")["data"]["mmubusd.toml"])
    container = one(documents, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert container["args"] == ["mmubusd", "--config", "/etc/mmubus/mmubusd.toml"]
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("MMUBUS_")]:
            patch.delenv(name)
        for variable in container["env"]:
            patch.setenv(variable["name"], variable["value"])
        return load(["--config", str(directory / "mmubusd.toml")])


def test_the_server_takes_its_configuration(overlay: list[Document], tmp_path: Path) -> None:
    settings = settings_of(overlay, tmp_path)
    container = one(overlay, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert any(address.endswith(f":{ports['grpc']}") for address in settings.listen)
    assert settings.metrics_listen is not None
    assert settings.metrics_listen.endswith(f":{ports['metrics']}")
    assert settings.insecure_public == (settings.tls_cert is None)


def test_without_an_overlay_the_server_refuses(tree: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="can be reached from other machines"):
        settings_of(compose(tree, "base"), tmp_path)


def test_the_server_has_time_to_stop(overlay: list[Document], tmp_path: Path) -> None:
    pod = dict(pods(overlay))["mmubus"]
    before_s = pod["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] > before_s + settings_of(overlay, tmp_path).drain_s + STOP_S


def asked(probe: Document) -> str:
    """The health service's name that a probe asks for."""
    if "grpc" in probe:
        assert "exec" not in probe
        return str(probe["grpc"].get("service", ""))
    program, address, *names = probe["exec"]["command"][1:]
    assert program == "/opt/mmubus/bin/probe.py"
    assert address == "unix:/run/mmubus/mmubus.sock"
    return " ".join(names)


def test_probes_ask_what_they_should(overlay: list[Document]) -> None:
    server = dict(pods(overlay))["mmubus"]["containers"][0]
    assert asked(server["startupProbe"]) == asked(server["readinessProbe"]) == ""
    assert asked(server["livenessProbe"]) == LIVENESS  # does not flip while it drains
    variables = {variable["name"] for variable in server["env"]}
    assert ("grpc" in server["livenessProbe"]) == ("MMUBUS_TLS_CERT" not in variables), "gRPC probes speak no TLS"


def test_pods_may_do_nothing_but_their_work(overlay: list[Document]) -> None:
    names = []
    for name, pod in pods(overlay):
        names.append(name)
        assert pod["automountServiceAccountToken"] is False
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in pod["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert "memory" in container["resources"]["limits"]
    assert sorted(names) == ["application", "hmm", "mmubus", "rdma"]


def test_what_is_selected_is_there(overlay: list[Document]) -> None:
    """What selects finds pods by labels that they have; volumes name secrets and config maps that are made."""
    labels = [
        document["spec"]["template"]["metadata"]["labels"]
        for document in overlay
        if document["kind"] in ("StatefulSet", "Deployment")
    ]
    selectors = [
        one(overlay, "Service")["spec"]["selector"],
        one(overlay, "PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ]
    selectors += [
        one(overlay, "NetworkPolicy", name)["spec"]["podSelector"]["matchLabels"]
        for name in ("mmubus", "mmubus-clients")
    ]
    for selector in selectors:
        assert any(selector.items() <= have.items() for have in labels), selector
    made = {(document["kind"], document["metadata"]["name"]) for document in overlay}
    for _, pod in pods(overlay):
        for volume in pod.get("volumes", []):
            if "secret" in volume:
                assert ("Secret", volume["secret"]["secretName"]) in made
            if "configMap" in volume:
                assert ("ConfigMap", volume["configMap"]["name"]) in made


def test_the_monitor_finds_the_metrics(tree: Path) -> None:
    documents = compose(tree, "overlays/tls")
    monitor, service = one(documents, "ServiceMonitor"), one(documents, "Service")
    assert monitor["spec"]["selector"]["matchLabels"].items() <= service["metadata"]["labels"].items()
    assert {endpoint["port"] for endpoint in monitor["spec"]["endpoints"]} == {"metrics"}
    assert "metrics" in {port["name"] for port in service["spec"]["ports"]}


def judge_monitor(path: Path) -> str:
    """What check-jsonschema says of a ServiceMonitor, a kind of the operator and not of the API; "" when it is one."""
    schema = ROOT / "tests" / "servicemonitor.schema.json"
    done = subprocess.run(
        [TOOLS / "check-jsonschema", "--schemafile", schema, path], capture_output=True, text=True, check=False
    )
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_the_monitor_is_what_the_operator_takes(tree: Path, tmp_path: Path) -> None:
    composed = tmp_path / "composed.yaml"
    composed.write_text(yaml.safe_dump(one(compose(tree, "overlays/tls"), "ServiceMonitor")))
    assert judge_monitor(composed) == ""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [("port: metrics", "prot: metrics"), ("interval: 15s", "interval: 15 sec"), ("  selector:", "  selecter:")],
)
def test_the_operator_s_schema_finds_what_is_wrong(tmp_path: Path, right: str, wrong: str) -> None:
    monitor = (KUBERNETES / "components/monitoring/servicemonitor.yaml").read_text()
    assert right in monitor
    (tmp_path / "monitor.yaml").write_text(monitor)
    assert judge_monitor(tmp_path / "monitor.yaml") == ""
    (tmp_path / "monitor.yaml").write_text(monitor.replace(right, wrong))
    assert wrong.split(":")[0].strip() in judge_monitor(tmp_path / "monitor.yaml")


def test_secrets_are_the_user_s(tree: Path) -> None:
    documents = compose(tree, "overlays/tls")
    secret = one(documents, "Secret", "mmubus-server-tls")
    assert base64.b64decode(secret["data"]["tls.key"]) == b"server.key\n"
    tracked = subprocess.run(
        ["git", "ls-files", "deploy"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout
    assert not re.search(r"\.(key|crt|pem)$", tracked, re.MULTILINE)


def test_files_pass_yamllint() -> None:
    relaxed = "{extends: default, rules: {line-length: {max: 132}, document-start: disable, comments: disable}}"
    done = subprocess.run(
        [TOOLS / "yamllint", "--strict", "--config-data", relaxed, ROOT / "deploy"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout

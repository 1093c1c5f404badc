"""Over real HTTP, from one process to another: push, and load the same logits to the bit."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from fewshot_nlp.config import CONFIG_NAME
from tests.hub.clients import READ, REPO, WRITE, WRONG
from tests.hub.hub_server import HubServer, Repo
from tests.tiny import tiny_bert

pytestmark = [pytest.mark.processes, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
TOKENS = (WRITE, READ, WRONG)


class World:
    """A Hub, and users' processes that know it by its address alone."""

    def __init__(self, hub, folder):
        self.hub, self.folder, self.output = hub, folder, ""

    def run(self, step, home):
        dropped = (
            "HF_HUB_OFFLINE",
            "HF_TOKEN",
            "HUGGING_FACE_HUB_TOKEN",
            "HF_HUB_CACHE",
            "HF_HUB_DISABLE_IMPLICIT_TOKEN",
        )
        environment = {name: value for name, value in os.environ.items() if name not in dropped}
        environment |= {
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / home),
            "HF_HUB_DISABLE_XET": "1",
            "OMP_NUM_THREADS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-m", "tests.hub.clients", step, str(self.folder)]
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300)
        self.output += done.stdout + done.stderr
        assert done.returncode == 0, done.stderr
        return json.loads((self.folder / f"{step}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    tiny_bert(folder / "bert")
    with HubServer({WRITE: "write", READ: "read"}) as hub:
        for name, files in {
            "other-model": ["config.json", "model.safetensors"],
            "peft": ["adapter_config.json"],
        }.items():
            hub.repos[f"tester/{name}"] = Repo(private=False)
            hub.repos[f"tester/{name}"].commit("main", dict.fromkeys(files, b"{}"), "by someone else")
        yield World(hub, folder)


@pytest.fixture(scope="module")
def pushed(world):
    return world.run("push", "author")


@pytest.fixture(scope="module")
def pulled(world, pushed):
    return world.run("pull", "reader")


@pytest.fixture(scope="module")
def refused(world, pushed):
    return world.run("refused", "stranger")


def test_a_fresh_process_gives_the_same_logits_to_the_bit(pushed, pulled):
    first, second, lora = pushed["logits"]
    assert first != second != lora
    assert pulled["latest"] == second
    assert pulled["first"] == first, "by the commit's own id"
    assert pulled["branch"] == lora
    assert pulled["pr"] == first
    assert pulled["elsewhere"] == second
    assert pulled["label_names"] == ["a", "b"]


def test_what_was_downloaded_loads_without_the_hub(world, pushed, pulled):
    before = len(world.hub.requests)
    answer = world.run("cached", "reader")
    assert answer["latest"] == pushed["logits"][1]
    assert answer["other"].startswith("FileNotFoundError: There is no folder 'tester/other'")
    assert "Drop local_files_only" in answer["other"]
    assert not [request for request in world.hub.requests[before:] if "tester" in request.path]


def test_the_repository_is_made_private_and_filled_in_single_commits(world, pushed):
    repo = world.hub.repos[REPO]
    assert repo.private
    assert repo.messages[:3] == ["initial commit", "the first", "Upload few-shot adapter"]
    # The third push changed nothing, so it made no commit.
    assert pushed["oids"][1] == pushed["oids"][2] == repo.branches["main"]
    assert set(repo.branches) == {"main", "lora", "refs/pr/1"}
    assert pushed["pr"] == f"{world.hub.url}/{REPO}/discussions/1"
    assert set(world.hub.files(REPO)) == {
        ".gitattributes",
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        CONFIG_NAME,
        "fewshot_params.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_weights_of_an_earlier_push_are_removed(world, pushed, pulled):
    files = world.hub.files("tester/full")
    assert "adapter_model.safetensors" in files
    assert not {"config.json", "model.safetensors"} & set(files)
    assert pulled["replaced"] == pushed["logits"][2]


def test_weights_travel_as_git_lfs_objects(world, pushed):
    content = world.hub.files(REPO)["adapter_model.safetensors"]
    assert world.hub.objects[hashlib.sha256(content).hexdigest()] == content


def test_only_what_is_read_is_downloaded(world, pulled):
    fetched = {path.rsplit("/", 1)[-1] for path in world.hub.paths("GET") if "/resolve/" in path}
    assert fetched == {CONFIG_NAME, "adapter_config.json", "adapter_model.safetensors", "fewshot_params.safetensors"}


def test_the_card_on_the_hub_names_the_repository(world, pushed, tmp_path):
    (tmp_path / "README.md").write_bytes(world.hub.files(REPO)["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert f'FewShotClassifier.from_pretrained("{REPO}")' in card.text
    assert card.data.library_name == "fewshot_nlp"
    assert 'from_pretrained("tester/full")' in world.hub.files("tester/full")["README.md"].decode()


@pytest.mark.parametrize(
    ("attempt", "expected"),
    [
        (
            "push with read access",
            "HfHubHTTPError: 403 Forbidden: You have read access but not the required permissions",
        ),
        ("push with a wrong token", "Invalid credentials in Authorization header"),
        ("push without a token", "401 Unauthorized"),
        ("push to another's", "403 Forbidden: You don't have the rights to create a model"),
        ("push with a broken token", "ValueError: token is empty or has blanks"),
        ("push over another model", "ValueError: 'tester/other-model' holds another model (config.json)"),
        ("pull what is private", "FileNotFoundError: There is no folder 'tester/prompt', and no such repository that"),
        ("pull what is missing", "FileNotFoundError: There is no folder 'tester/missing', and no such repository that"),
        ("pull with a wrong token", "Invalid credentials in Authorization header"),
        ("pull another revision", "FileNotFoundError: 'tester/prompt' has no revision 'nope'"),
        ("pull another model", "ValueError: 'tester/other-model' is not a few-shot adapter: fewshot_config.json is"),
        ("pull a plain PEFT adapter", "ValueError: 'tester/peft' is a plain PEFT adapter"),
        (
            "pull one whose backbone is elsewhere",
            "OSError: The backbone of 'tester/prompt' is a folder of its author's, '.../bert', and not on the Hub. Say",
        ),
    ],
)
def test_refusals_are_clear(refused, attempt, expected):
    assert expected in refused[attempt].replace("\n", " ")


def test_a_refused_push_makes_no_repository(world, refused):
    assert not {"tester/new", "someone/new"} & set(world.hub.repos)
    assert set(world.hub.files("tester/other-model")) == {"config.json", "model.safetensors"}


def test_tokens_travel_in_the_authorization_header_alone(world, pushed, pulled, refused):
    seen = set()
    for request in world.hub.requests:
        headers = dict(request.headers)
        seen.add(headers.pop("authorization", None))
        elsewhere = request.path + json.dumps(headers) + request.body.decode("latin-1")
        assert not [token for token in TOKENS if token in elsewhere], request.path
    assert {f"Bearer {token}" for token in TOKENS} < seen
    assert not [token for token in TOKENS if token in world.output]


def test_no_path_of_the_author_is_published(world, pushed):
    settings = json.loads(world.hub.files(REPO)["adapter_config.json"])
    assert settings["base_model_name_or_path"] == ".../bert"
    for repo in world.hub.repos.values():
        for commit in repo.commits.values():
            assert not [name for name, content in commit.items() if str(world.folder).encode() in content]


def test_tokens_are_in_no_file(world, pushed, pulled, refused):
    files = [path for path in world.folder.rglob("*") if path.is_file()]
    assert len(files) > 20
    for path in files:
        content = path.read_bytes()
        assert not [token for token in TOKENS if token.encode() in content], path
    for repo in world.hub.repos.values():
        for commit in repo.commits.values():
            assert not [token for token in TOKENS for content in commit.values() if token.encode() in content]

"""The repository that a run is pushed to: claimed before training, written to once all is saved."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

from fewshot_nlp.checks import first_line
from fewshot_nlp.hub import FewShotAdapter
from fewshot_nlp.hub.files import check_repository, check_token
from fewshot_nlp.training import FewShotTrainingArguments


def claim_repository(args: FewShotTrainingArguments) -> str:
    """Make the repository before training: what would be refused at the end is refused now.

    Raises:
        OSError: the Hub cannot be reached, or the token may not write to the repository.
        ValueError: the repository holds another model, or the token cannot be sent.
    """
    check_token(args.hub_token)
    name = args.hub_model_id or Path(args.output_dir).resolve().name
    api = HfApi(token=args.hub_token)
    try:
        repo_id = api.create_repo(name, private=args.hub_private_repo, exist_ok=True).repo_id
        check_repository(api, repo_id)
        _check_writable(api, repo_id)
    except (ValueError, OSError):
        raise
    except Exception as error:
        # The client's own errors of transport are of no common kind.
        raise OSError(
            f"The Hub cannot be asked for {name!r}: {error} Check the connection, or drop push_to_hub."
        ) from error
    return repo_id


def _check_writable(api: HfApi, repo_id: str) -> None:
    try:
        api.auth_check(repo_id, write=True)
    except HfHubHTTPError as error:
        # A Hub that does not know the question has no answer.
        if error.response.status_code in (401, 403):
            raise OSError(
                f"The token may not write to {repo_id!r}: {first_line(error)} Give hub_token one that may, or another "
                f"hub_model_id."
            ) from error


def push(adapter: FewShotAdapter, repo_id: str, args: FewShotTrainingArguments) -> None:
    """Push what is saved already: a failure takes nothing away, and says so."""
    try:
        adapter.push_to_hub(repo_id, private=args.hub_private_repo, token=args.hub_token)
    except Exception as error:
        raise OSError(
            f"The push to {repo_id!r} failed ({type(error).__name__}: {first_line(error)}). The adapter is whole in "
            f"{args.output_dir!r}. Push it when that is mended: FewShotAdapter.from_pretrained({args.output_dir!r})"
            f".push_to_hub({repo_id!r})."
        ) from error
    print(f"Pushed to {repo_id}.", flush=True)

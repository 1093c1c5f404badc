"""A stream of stages: how much is forgotten, naively, with replay, and with elastic weight consolidation.

    python recipes/benchmarks/lifelong.py --data_dir ../shared/data/clinc150
    python recipes/benchmarks/lifelong.py --data_dir ../shared/data/banking77 --stream splits

The folder holds data.jsonl ({"text", "label"} a line). --stream domains: the ten domains of CLINC150 (Larson et al.
2019), 15 intents each, one after another. --stream splits: the train classes of split_1.json to split_5.json, which
overlap. The encoder is trained as a whole as a prototypical network; after every stage it answers, on texts that were
held out, episodes of every stage's classes. Prints one table: average accuracy, backward and forward transfer and
forgetting in percent with 95 % intervals over episodes, and whether replay forgets less than half as much as naive,
episode by episode. Runs that are already in --output_dir are read, not repeated; those of other settings are an error,
unless --overwrite_output_dir true has them measured again. Settings were tried with --evaluate_on validation alone.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from runs import once, settings_of

from fewshot_nlp.cli.lifelong import EPISODES, RESULTS, execute, parse_stream, prepare
from fewshot_nlp.evaluation import mean_interval
from fewshot_nlp.evaluation.lifelong import AccuracyMatrix

RECIPE = Path(__file__).parents[1] / "lifelong.yaml"
VARIANTS = ("naive", "replay", "ewc")
COMMON = (
    "--n_way 15 --k_shot 1 --max_k_shot none --n_query 1 --meta_batch_size 2 --max_steps 30 --learning_rate 2e-4 "
    "--eval_k_shots 1 --eval_n_query 1 --test_episodes 200 --replay_size 200 --replay_share 0.5 --ewc_weight 1e6 "
    "--ewc_episodes 30 --disable_tqdm true"
)
#: The domains of CLINC150 in the order of its paper.
DOMAINS = {
    "banking": "transfer transactions balance freeze_account pay_bill bill_balance bill_due interest_rate routing "
    "min_payment order_checks pin_change report_fraud account_blocked spending_history",
    "credit cards": "credit_score report_lost_card credit_limit rewards_balance new_card application_status "
    "card_declined international_fees apr redeem_rewards credit_limit_change damaged_card replacement_card_duration "
    "improve_credit_score expiration_date",
    "kitchen and dining": "recipe restaurant_reviews calories nutrition_info restaurant_suggestion ingredients_list "
    "ingredient_substitution cook_time food_last meal_suggestion restaurant_reservation confirm_reservation how_busy "
    "cancel_reservation accept_reservations",
    "home": "shopping_list shopping_list_update next_song play_music update_playlist todo_list todo_list_update "
    "calendar calendar_update what_song order order_status reminder reminder_update smart_home",
    "auto and commute": "traffic directions gas gas_type distance current_location mpg oil_change_when oil_change_how "
    "jump_start uber schedule_maintenance last_maintenance tire_pressure tire_change",
    "travel": "book_flight book_hotel car_rental travel_suggestion travel_alert travel_notification carry_on timezone "
    "vaccines translate flight_status international_visa lost_luggage plug_type exchange_rate",
    "utility": "time alarm share_location find_phone weather text spelling make_call timer date calculator "
    "measurement_conversion flip_coin roll_dice definition",
    "work": "direct_deposit pto_request taxes payday w2 pto_balance pto_request_status next_holiday insurance "
    "insurance_change schedule_meeting pto_used meeting_schedule rollover_401k income",
    "small talk": "greeting goodbye tell_joke where_are_you_from how_old_are_you what_is_your_name who_made_you "
    "thank_you what_can_i_ask_you what_are_your_hobbies do_you_have_pets are_you_a_bot meaning_of_life "
    "who_do_you_work_for fun_fact",
    "meta": "change_ai_name change_user_name cancel user_name reset_settings whisper_mode repeat no yes maybe "
    "change_language change_accent change_volume change_speed sync_device",
}


def stages(stream: str, data_dir: Path) -> dict[str, list[str]]:
    """Class names by stage."""
    if stream == "domains":
        return {name: names.split() for name, names in DOMAINS.items()}
    files = {i: data_dir / f"split_{i}.json" for i in range(1, 6)}
    return {f"split {i}": json.loads(path.read_text(encoding="utf-8"))["train"] for i, path in files.items()}


def measure(variant: str, data: Path, stage_file: Path, folder: Path, extra: list[str]) -> AccuracyMatrix:
    """Accuracies of one variant, from ``folder`` if they are there and were measured with these settings."""
    arguments = ["--variant", variant, "--dataset_name", str(data), "--stage_file", str(stage_file)]
    told = parse_stream([*arguments, *shlex.split(COMMON), *extra, "--output_dir", str(folder)], RECIPE)
    single, known = folder / EPISODES, settings_of(told) | asdict(told.lifelong)
    once(told, known, single, lambda: execute(prepare(told)))
    (shots,) = json.loads(single.read_text(encoding="utf-8")).items()
    names = json.loads((folder / RESULTS).read_text(encoding="utf-8"))["lifelong"][shots[0]]["stages"]
    return AccuracyMatrix(names, np.asarray(shots[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, required=True)
    parser.add_argument("--stream", choices=("domains", "splits"), default="domains")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--output_dir", type=Path, default=Path("output/lifelong_benchmark"))
    chosen, extra = parser.parse_known_args()

    chosen.output_dir.mkdir(parents=True, exist_ok=True)
    stage_file = chosen.output_dir / f"{chosen.stream}.json"
    stage_file.write_text(json.dumps(stages(chosen.stream, chosen.data_dir)), encoding="utf-8")
    found = {
        variant: measure(
            variant, chosen.data_dir / "data.jsonl", stage_file, chosen.output_dir / f"{chosen.stream}_{variant}", extra
        )
        for variant in chosen.variants
    }
    start = next(iter(found.values())).accuracies[0]
    print(f"\nUntrained, all stages: {shown(mean_interval(start))}\n")
    print("| | average accuracy | backward transfer | forward transfer | forgetting |\n|---|---|---|---|---|")
    for variant, matrix in found.items():
        figures = (matrix.average_accuracy, matrix.backward_transfer, matrix.forward_transfer, matrix.forgetting)
        print(f"| {variant} | " + " | ".join(map(shown, figures)) + " |")
    if {"naive", "replay"} <= found.keys():
        rest = mean_interval(found["naive"].forgotten / 2 - found["replay"].forgotten)
        print(f"\nHalf of what naive forgets, minus what replay forgets: {shown(rest)}")


def shown(interval: Any) -> str:
    return f"{100 * interval.mean:.1f} ± {100 * interval.ci95:.1f}"


if __name__ == "__main__":
    main()

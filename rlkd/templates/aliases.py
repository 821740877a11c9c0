"""Old and new names of data sets, and official templates with known problems.

`datasets` 4 dropped loading scripts and with them bare names: what promptsource calls glue is nyu-mll/glue on the hub.
"""

from __future__ import annotations

# promptsource's name -> the hub id with the same columns as plain files.
HUB_IDS = {
    "adversarial_qa": "UCLNLP/adversarial_qa",
    "aeslc": "Yale-LILY/aeslc",
    "ag_news": "fancyzhx/ag_news",
    "ai2_arc": "allenai/ai2_arc",
    "amazon_polarity": "fancyzhx/amazon_polarity",
    "anli": "facebook/anli",
    "app_reviews": "sealuzh/app_reviews",
    "aqua_rat": "deepmind/aqua_rat",
    "asset": "facebook/asset",
    "banking77": "PolyAI/banking77",
    "billsum": "FiscalNote/billsum",
    "blimp": "nyu-mll/blimp",
    "cnn_dailymail": "abisee/cnn_dailymail",
    "common_gen": "allenai/common_gen",
    "commonsense_qa": "tau/commonsense_qa",
    "coqa": "stanfordnlp/coqa",
    "cos_e": "Salesforce/cos_e",
    "cosmos_qa": "allenai/cosmos_qa",
    "dbpedia_14": "fancyzhx/dbpedia_14",
    "dream": "dataset-org/dream",
    "drop": "ucinlp/drop",
    "emotion": "dair-ai/emotion",
    "financial_phrasebank": "takala/financial_phrasebank",
    "gigaword": "Harvard/gigaword",
    "glue": "nyu-mll/glue",
    "hellaswag": "Rowan/hellaswag",
    "hotpot_qa": "hotpotqa/hotpot_qa",
    "imdb": "stanfordnlp/imdb",
    "jfleg": "jhu-clsp/jfleg",
    "kilt_tasks": "facebook/kilt_tasks",
    "math_qa": "allenai/math_qa",
    "medical_questions_pairs": "curaihealth/medical_questions_pairs",
    "multi_news": "alexfabbri/multi_news",
    "multi_nli": "nyu-mll/multi_nli",
    "narrativeqa": "deepmind/narrativeqa",
    "newsroom": "lil-lab/newsroom",
    "openai_humaneval": "openai/openai_humaneval",
    "openbookqa": "allenai/openbookqa",
    "paws": "google-research-datasets/paws",
    "piqa": "ybisk/piqa",
    "poem_sentiment": "google-research-datasets/poem_sentiment",
    "qasc": "allenai/qasc",
    "quac": "allenai/quac",
    "quail": "textmachinelab/quail",
    "quartz": "allenai/quartz",
    "quora": "quora-competitions/quora",
    "quoref": "allenai/quoref",
    "race": "ehovy/race",
    "ropes": "allenai/ropes",
    "rotten_tomatoes": "cornell-movie-review-data/rotten_tomatoes",
    "samsum": "knkarthick/samsum",
    "scicite": "allenai/scicite",
    "sciq": "allenai/sciq",
    "scitail": "allenai/scitail",
    "sms_spam": "ucirvine/sms_spam",
    "snli": "stanfordnlp/snli",
    "social_i_qa": "allenai/social_i_qa",
    "squad": "rajpurkar/squad",
    "squad_v2": "rajpurkar/squad_v2",
    "super_glue": "aps/super_glue",
    "swag": "allenai/swag",
    "trec": "tasksource/trec",
    "trivia_qa": "mandarjoshi/trivia_qa",
    "tweet_eval": "cardiffnlp/tweet_eval",
    "web_questions": "stanfordnlp/web_questions",
    "wiki_bio": "michaelauli/wiki_bio",
    "wiki_qa": "microsoft/wiki_qa",
    "winograd_wsc": "ErnestSDavis/winograd_wsc",
    "winogrande": "allenai/winogrande",
    "wiqa": "allenai/wiqa",
    "xnli": "facebook/xnli",
    "xquad": "google/xquad",
    "xsum": "EdinburghNLP/xsum",
    "yelp_polarity": "fancyzhx/yelp_polarity",
    "yelp_review_full": "Yelp/yelp_review_full",
}
OLD_NAMES = {hub: old for old, hub in HUB_IDS.items()}
# Other copies of the same data.
OLD_NAMES |= {"CogComp/trec": "trec", "Samsung/samsum": "samsum"}


def hub_id(name: str) -> str:
    """The id of a data set on the hub today: glue -> nyu-mll/glue; other names are returned unchanged."""
    return HUB_IDS.get(name, name)


def template_name(dataset: str) -> str:
    """promptsource's name of `hub-owner/name[/subset]`: nyu-mll/glue/mrpc -> glue/mrpc; others are unchanged."""
    owner, _, rest = dataset.partition("/")
    name, _, subset = rest.partition("/")
    old = OLD_NAMES.get(f"{owner}/{name}")
    return dataset if old is None else f"{old}/{subset}".rstrip("/")


def known_problem(template_id: str) -> str | None:
    """The known problem of an official template, or None."""
    return next((problem for ids, problem in KNOWN_PROBLEMS.items() if template_id.startswith(ids)), None)


# First characters of template ids -> what is wrong and the remedy.
_COARSE = (
    "its numbers are those of label_coarse, Description first; the hub's column is coarse_label, Abbreviation first. "
    "Use --column-map coarse_label=label_coarse --label-map label_coarse:0=2,1=1,2=0,3=3,4=5,5=4"
)
_FINE = (
    "it reads label_fine as numbered in 2021; the hub's fine_label counts 50 classes in another order. "
    "Use other templates, or --column-map and a full --label-map"
)
_RACE = "it asks about the gold answer in every row, so that its 'No' is always wrong"
_DASH = "it drops the first two characters of every summary, taken for a dash: other summaries lose their beginning"
KNOWN_PROBLEMS: dict[tuple[str, ...], str] = {
    ("21d04668", "6c391f4f", "7a3ed4dd", "861d1a48", "aad2def1"): _COARSE,  # trec
    ("2d4e0add", "309bf243", "3aff84f3", "43a188a2", "71090d59", "736b2629", "7a9e6f3c"): _FINE,
    ("93a06e72", "a0096044", "bc58ba18", "cfa8fde0", "e98b9294", "fa588c55"): _FINE,
    ("b808b05e", "2e7f5fff", "26fdd0e9"): _RACE,  # "Is this the right answer" of race/all, middle, high
    ("12269bd1", "940d0ce4", "9ab370ad", "b15485f5", "bc910e51", "d5a4bb2a"): _DASH,  # multi_news
}

"""Tables of attention experts, and of FFN experts of the same model beside them: below results/."""

from moe_atlas.tables.columns import INTEGER, LAYER, NUMBER, PAIR, SITE, STRING, Table

# Forms of a token, in the order in which they are asked for (moe_atlas.heads.classes).
FORMS = ("special", "space", "digit", "punctuation", "capitalised", "word", "piece")

_MODEL = ("model", STRING, "row id of config/models.tsv, or STUDY.OBJECTIVE.ARM of a MoA model trained here")
_CORPUS = ("corpus", STRING, "text that it is on")
_KIND = ("kind", STRING, "causal, encoder, decoder or cross: whose attention; ffn: of FFN experts")
_WHERE = (_MODEL, _CORPUS, SITE, _KIND, LAYER)
_EXPERT = ("expert", STRING, "expert label")
_ROUTER = (
    "router",
    STRING,
    "learned; frozen: of a model whose router was never trained; random: rows of random direction and the same "
    "lengths, on the same hidden states",
)
_INTERVAL = (
    ("low", NUMBER, "95 % interval over documents; null below 5 of them"),
    ("high", NUMBER, "its upper end"),
)
_RANGE = (
    ("chance_low", NUMBER, "95 % of what chance gives lie above"),
    ("chance_high", NUMBER, "and below"),
)
_TOKENS = ("tokens", INTEGER, "tokens it is over; first ones of a sequence are left out")


def _table(name: str, *columns) -> Table:
    return Table(f"tables/{name}.parquet", (), columns)


HEADS: dict[str, Table] = {
    "moa_load": _table(
        "moa_load",
        *_WHERE,
        _EXPERT,
        ("measure", STRING, "share: of all choices; weight: of the sum of all weights that the model applies"),
        ("value", NUMBER, "the expert's part of 1"),
        ("chance", NUMBER, "1/E. Where k = E every expert is chosen by every token, and share says nothing"),
        *_INTERVAL,
        _TOKENS,
    ),
    "moa_routing": _table(
        "moa_routing",
        *_WHERE,
        ("experts", INTEGER, "E"),
        ("top_k", INTEGER, "k; k = E chooses nothing"),
        (
            "measure",
            STRING,
            "entropy: of the load over log E, 1 is even; max_vio: largest load over the mean, less 1; cv: standard "
            "deviation of the load over its mean; dead: experts that no token chose",
        ),
        ("value", NUMBER, "of the load on this text"),
        ("chance", NUMBER, "mean over as many choices of k different experts, even and independent"),
        *_RANGE,
        *_INTERVAL,
        _TOKENS,
    ),
    "moa_association": _table(
        "moa_association",
        *_WHERE,
        _ROUTER,
        (
            "measure",
            STRING,
            "information: I(token type; expert) / H(expert) over choices; ablation: Spearman's rho of an expert's "
            "association with classes of tokens and what leaving it out costs there",
        ),
        ("value", NUMBER, "of token types with 20 tokens or more"),
        ("chance", NUMBER, "mean when experts are exchanged: among the tokens of a sequence; among experts (ablation)"),
        *_RANGE,
        ("corrected", NUMBER, "value - chance"),
        ("low", NUMBER, "95 % interval of corrected over documents; null below 5 of them, and of ablation"),
        ("high", NUMBER, "its upper end"),
        ("p_value", NUMBER, "share of exchanges that reach the value"),
        ("most", NUMBER, "information that k choices can have at most: 1 - log k / H(expert)"),
        ("types", INTEGER, "token types; of ablation cells of experts and classes"),
        _TOKENS,
    ),
    "moa_tokens": _table(
        "moa_tokens",
        *_WHERE,
        _ROUTER,
        _EXPERT,
        ("rank", INTEGER, "0 has the largest npmi of the expert's token types; at most 10, those above 0"),
        ("token_id", INTEGER, "id in the model's tokenizer"),
        ("token", STRING, "the token as text"),
        ("count", INTEGER, "tokens of this type that chose the expert"),
        ("tokens", INTEGER, "tokens of this type, 20 or more"),
        ("pmi", NUMBER, "log of the count over what independence would give, nats"),
        ("npmi", NUMBER, "pmi / -log of the pair's share of all choices; 1: neither comes without the other"),
        ("p_value", NUMBER, "share of exchanges of experts within sequences that reach the count"),
    ),
    "moa_circuits": _table(
        "moa_circuits",
        _MODEL,
        _KIND,
        LAYER,
        ("circuit", STRING, "QK: W_q^T W_k; OV: W_o W_v; d x d, heads of an expert together, no positions, no norms"),
        *PAIR,
        ("cosine", NUMBER, "of the two operators, as vectors of all their numbers"),
        ("chance", NUMBER, "mean of pairs of random Gaussian experts with this layer's keys or values"),
        *_RANGE,
    ),
    "moa_maps": _table(
        "moa_maps",
        *_WHERE,
        (
            "measure",
            STRING,
            "distance: mean of sum_s a |t - s|, tokens; divergence: Jensen-Shannon divergence of the maps of two "
            "experts on the same token, bits; every expert on every token, chosen or not; mean over heads",
        ),
        PAIR[0],
        ("b", STRING, "the other expert of a divergence; null: none"),
        ("value", NUMBER, "mean over tokens"),
        ("chance", NUMBER, "mean when experts are exchanged in each block of documents: of all experts, of all pairs"),
        *_RANGE,
        *_INTERVAL,
        ("uniform", NUMBER, "distance of a map that is even over all tokens it may see; of divergences null"),
        _TOKENS,
    ),
    "moa_ablation": _table(
        "moa_ablation",
        *_WHERE,
        _EXPERT,
        ("by", STRING, "which token names the class: read (at its place) or predicted; a masked one is predicted only"),
        ("family", STRING, "all, form or frequency"),
        (
            "token_class",
            STRING,
            "all; of form special, space, digit, punctuation, capitalised, word or piece; of "
            "frequency frequent, common or rare",
        ),
        ("value", NUMBER, "rise of the loss without the expert, nats a token of this class"),
        *_INTERVAL,
        ("others", NUMBER, "mean rise without one of the other experts of the layer"),
        ("difference", NUMBER, "value - others"),
        ("difference_low", NUMBER, "95 % interval over the same documents"),
        ("difference_high", NUMBER, "its upper end"),
        ("association", NUMBER, "log of the class's share of the expert's choices over its share of all; null: hidden"),
        ("tokens", INTEGER, "predicted tokens of the class"),
    ),
    "moa_sites": _table(
        "moa_sites",
        _MODEL,
        ("corpus", STRING, "text, or two texts whose loads are compared, with a comma between"),
        LAYER,
        (
            "measure",
            STRING,
            "information: corrected, as in moa_association; entropy, max_vio: as in moa_routing; domain: "
            "Jensen-Shannon divergence of the loads on two texts, bits, less its mean when documents are exchanged",
        ),
        ("attention", NUMBER, "of the layer's attention experts"),
        ("ffn", NUMBER, "of its FFN experts"),
        ("difference", NUMBER, "attention - ffn"),
        ("low", NUMBER, "95 % interval of the difference, over the same documents; null below 5 of them"),
        ("high", NUMBER, "its upper end"),
    ),
}

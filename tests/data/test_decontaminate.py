import pickle

from jaxllm.data.decontaminate import DecontaminateConfig, Evaluation, Hit

EN = "Janet sells sixteen eggs a day at the farmers market and bakes muffins for all her friends"
ZH = "小明有十六个鸡蛋，每天早上吃三个，剩下的都拿到市场上去卖。"
CONFIG = DecontaminateConfig(action="cut")


def evaluation(config=CONFIG):
    return Evaluation(
        [("gsm8k", EN), ("cmrc", ZH), ("cmrc", EN), ("short", "what is the capital of france today")], config
    )


def test_overlaps_are_found_in_both_scripts_and_name_their_source():
    texts = [
        f"Some page.\nQ: {EN.upper()}?\nThe end.",
        "nothing to see here " * 10,
        f"他说：{ZH[:20]}……",
        EN[20:80],  # 12 words
        f"{ZH} {EN}",
        "what is the capital of france today",
        "",
    ]
    assert evaluation().hits(texts) == [
        Hit(0, ("gsm8k",), "Some page.\nThe end."),
        Hit(2, ("cmrc",), ""),
        Hit(4, ("gsm8k", "cmrc"), ""),
    ]


def test_short_texts_are_looked_for_as_a_whole_down_to_a_length():
    found = evaluation()
    assert found.n_texts == {"gsm8k": 1, "cmrc": 2} and found.n_short == {"short": 1}
    ten = Evaluation([("a", "one two three four five six seven eight nine ten")], CONFIG)
    assert [hit.index for hit in ten.hits(["zero One, two three four five six seven eight nine ten eleven"])] == [0]
    assert ten.hits(["one two three four five six seven eight nine"]) == []
    seven = evaluation(DecontaminateConfig(min_ngram=7))
    assert [hit.sources for hit in seven.hits(["so what is the capital of France today"])] == [("short",)]


def test_an_overlap_across_lines_takes_all_of_them():
    words = EN.split()
    text = "first\n" + "\n".join([" ".join(words[:5]), " ".join(words[5:9]), " ".join(words[9:])]) + "\nlast\n"
    assert evaluation().hits([text])[0].left == "first\nlast"
    head = " ".join(words[:13])
    assert evaluation().hits([f"a\n{head}\nb c d e f g h\n"])[0].left == "a\nb c d e f g h"


def test_overlaps_deep_in_a_long_text_and_after_pickling():
    text = "\n".join(f"line {i} of many" for i in range(40_000))
    at = text.index("line 30000")
    found = pickle.loads(pickle.dumps(evaluation()))
    hits = found.hits(["x", text[:at] + EN + "\n" + text[at:]])
    assert hits == [Hit(1, ("gsm8k",), text)]
    assert found.hits([text]) == []


def test_drop_leaves_nothing():
    assert evaluation(DecontaminateConfig()).hits(["a", f"b\n{EN}\nc"]) == [Hit(1, ("gsm8k",), "")]


def test_no_evaluation_text_meets_nothing():
    assert Evaluation([], CONFIG).hits([EN]) == []

"""What the authors' own scorers say to made-up answers, for the tests of this folder.

    python3 -m venv venv && venv/bin/pip install rouge==1.0.1 rouge-score==0.1.2 fuzzywuzzy==0.18.0 jieba
    venv/bin/python scores.py INFINITEBENCH LONGBENCH LEVAL > scores.json

The arguments are clones of OpenBMB/InfiniteBench (88b3daa), THUDM/LongBench (2e00731) and OpenLMLab/LEval (cd34b05).
Their functions are run as they are in these files; of a file that does more as it is imported, or needs packages that
load from elsewhere, only the functions are run. Nothing of them is kept but the numbers.
"""

import ast
import json
import os
import random
import sys
import types

import jieba
import re
import string
from collections import Counter
from fuzzywuzzy import fuzz
from rouge import Rouge
from rouge_score import rouge_scorer

INFINITE, LONG, EVAL = sys.argv[1:4]


def functions(path, given):
    """The functions of a file, with these names there."""
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    tree.body = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    space = dict(given)
    exec(compile(tree, path, "exec"), space)
    return space


class Lsum:
    """As `evaluate`'s "rouge" calls the package."""

    def compute(self, predictions, references, use_aggregator):
        scorer = rouge_scorer.RougeScorer(["rougeLsum"], use_stemmer=False)
        pairs = zip(references, predictions)
        return {"rougeLsum": [scorer.score(due, found)["rougeLsum"].fmeasure for due, found in pairs]}


basic = {"re": re, "string": string, "Counter": Counter, "List": list}
infinite = functions(os.path.join(INFINITE, "src/compute_scores.py"), {**basic, "ROUGE_SCORER": Lsum()})
long = functions(os.path.join(LONG, "LongBench/metrics.py"), {**basic, "jieba": jieba, "fuzz": fuzz, "Rouge": Rouge})
two = functions(os.path.join(LONG, "pred.py"), {**basic})
em = functions(os.path.join(EVAL, "Evaluation/em.py"), {**basic, "print": lambda *_: None})
f1 = functions(os.path.join(EVAL, "Evaluation/f1.py"), basic)
exam = functions(os.path.join(EVAL, "Evaluation/auto_eval.py"), {**basic, "args": types.SimpleNamespace(pred_file="")})

cases = []


def add(scorer, answer, references, score, classes=()):
    case = {"scorer": scorer, "answer": answer, "references": [str(r) for r in references], "score": float(score)}
    if classes:
        case["classes"] = list(classes)
    cases.append(case)


draw = random.Random(7)
WORDS = ["The", "a", "an", "red", "Blue", "fox-trot", "it's", "of", "1,200", "sea.", "A", "river;", "co_op", "naïve", "«an»"]
WORDS += ["\n", "under the", "sea", "RIVER", "fox", "trot", "1200", "—", "…", "x", ".", "the.", "Straße", "the\u00a0sea"]
CHINESE = "的一是在不了有和人这中大为上个国，。！？「」《》“”、 \nABab12…—·"


def text(words, least, most):
    return " ".join(draw.choice(words) for _ in range(draw.randint(least, most)))


for _ in range(60):
    answer, references = text(WORDS, 0, 12), [text(WORDS, 1, 8) for _ in range(draw.randint(1, 3))]
    score = max(long["qa_f1_score"](answer, r) for r in references)
    assert score == max(f1["f1_score"](answer, r) for r in references) == infinite["qa_f1_score"](answer, references)
    add("token-f1", answer, references, score)
    answer, references = text(WORDS, 0, 40), [text(WORDS, 1, 40) for _ in range(draw.randint(1, 2))]
    add("rouge-of-sets", answer, references, max(long["rouge_score"](answer, r) for r in references))
    add("rouge-l-sum", answer, references[:1], infinite["get_score_one_longbook_sum_eng"](answer, references[0], ""))
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    add("rouge-l", answer, references, max(scorer.score(r, answer)["rougeL"].fmeasure for r in references))
    answer = "".join(draw.choice(CHINESE) for _ in range(draw.randint(0, 14)))
    references = ["".join(draw.choice(CHINESE) for _ in range(draw.randint(1, 10))) for _ in range(draw.randint(1, 2))]
    add("character-f1", answer, references, infinite["qa_f1_score_zh"](answer, references))
# Every mark that could be one.
marks = "".join(chr(c) for r in [(0x20, 0x7f), (0x2000, 0x2070), (0x3000, 0x3040), (0xfe30, 0xfe70), (0xff00, 0xfff0)]
                for c in range(*r))
for mark in marks:
    score = infinite["qa_f1_score_zh"](f"x{mark}", ["x"])
    add("character-f1", f"x{mark}", ["x"], score)

CLASSES = ["Date", "Other location", "location", "Other", "Human", "Human group", "group", "Number of something"]
for answer in ["Date", "It is a Human group", "Other location\nDate", "none", "", "location", "Human", "group Human Date",
               "Other location or Other entity, location"]:
    for due in CLASSES:
        add("class", answer, [due], long["classification_score"](answer, due, all_classes=CLASSES), CLASSES)
for answer in ["5", "There are 12 or 5, 12", "none", "", "12.5", "Paragraph 12", "Paragraph 3, 12 and 12", "段落12。"]:
    add("count", answer, ["12"], long["count_score"](answer, "12"))
    add("paragraph", answer, ["Paragraph 12"], long["retrieval_score"](answer, "Paragraph 12"))
    add("paragraph", answer, ["段落12"], long["retrieval_zh_score"](answer, "段落12"))
LINES = ["\n\n# first\nlet x = 1;\nlet y = 2;", "```rust\nfn main() {}\n```", "return self.value + 1", "", "// a\n\nnext line",
         "x" * 250 + "y = 3", "a b a b a b c", "the same text " * 20, "if (a > 0) { b(); }"]
for answer in LINES:
    for due in ["let x = 1;", "return self.value - 1", "fn main() { }", "x" * 230 + "z = 3", "b a b a b a", "",
                "text the same " * 20, "if (a < 0) { c(); }"]:
        add("code-line", answer, [due], long["code_sim_score"](answer, due))
for answer in ["The correct answer is (B).", "The correct answer is B", "**The correct answer is (C)**", "the correct answer is B",
               "The correct answer is (E) or The correct answer is A", "The correct answer is (B", "B", "",
               "The correct answer is D. Or rather: The correct answer is (B)"]:
    for due in "BD":
        add("letter", answer, [due], two["extract_answer"](answer) == due)

for answer in ["71432", " 71432.", "The pass key is 71432. Remember 5", "7 1432", "x", "", "071432"]:
    for label in ["71432", "7"]:
        add("first-digits", answer, [label], infinite["get_score_one_passkey"](answer, label, ""))
for answer in ["\"a-b\"", "The value is: a-b.", "a-b-c", "'a-b',x", "{a-b}", "a - b", ""]:
    add("word", answer, ["a-b"], infinite["get_score_one_kv_retrieval"](answer, "a-b", ""))
for answer in ["-12", "The return value is: -12.", "it is `-12`", "-12 or so", "", "12", "= 3 - 12", "+12", "-12.0", "value:12"]:
    for label in [-12, 12]:
        add("last-number", answer, [label], infinite["get_score_one_code_run"](answer, label, ""))
for answer in ["12", "it is 12, I think 13", "none", "", "12.5", "about 12.50", "-12", "12.", "3.4.5", ".5"]:
    for label in [12, 12.5, 3.4, 5]:
        try:
            score = infinite["get_score_one_math_find"](answer, label, "")
        except ValueError:
            score = 0  # Theirs ends here.
        add("first-number", answer, [label], score)
for answer in ["[4, 8, 12]", "4 8 13", "8, 4", "", "4", "1 + 3 = 4, 8", "4 8 12 16"]:
    add("beginning", answer, [4, 8, 12], infinite["get_score_one_math_calc"](answer, [4, 8, 12], ""))
for answer in ["B.", "B: foo", "The answer is: B", "The answer is: foo_bar", "answer: Option B", "correct option is: foo_bar()", "B",
               "It is: C", "the answer is:", "foo_bar", "The error is in foo_bar", "- answer:  \"B\"", "", "answer:\n`foo_bar`"]:
    add("function", answer, ["foo_bar", "B"], infinite["get_score_one_code_debug"](answer, ["foo_bar", "B"], ""))
for answer in ["B", "B.", "C", " B, since", "The Sea", "the answer is B", "The answer is: The Sea", "answer:C", "I think B or C",
               "I take AB", "option is  B", "it", "", "answer is", "(B)", "Because B", "CD B"]:
    add("option", answer, ["The Sea", "B"], infinite["get_score_one_longbook_choice_eng"](answer, ["The Sea", "B"], ""))
for answer in ["MARY", "It is Mary.", "mary-ann", "Mary's", "", "JOHN: MARY", "{mary}"]:
    add("name", answer, ["MARY"], infinite["get_score_one_longdialogue_qa_eng"](answer, ["MARY"], ""))


def exact(found, due):
    return em["compute_exact_match"]([found], [[due]]) / 100


ANSWERS = ["B", "BD", "B D", "The answer is B.", "B and D", "A. first\nC) third", "", "  ", "none of them", "D, B", "ACB", "b",
           "I think Both B. and D)", "Answer: C", "ABD Question: A", "Z. B Question C.", "All of A B C D", "CA"]
for answer in ANSWERS:
    for key in ["B", "BD", "A. first", "D", "ABC x", "none"]:
        exam["args"].pred_file = "quality"
        add("exam-letter", answer, [key], exact(exam["process_output_mc"](answer), exam["process_gt_mc"](key)))
        exam["args"].pred_file = "coursera"
        add("exam-letters", answer, [key], exact(exam["process_output_mc"](answer), exam["process_gt_mc"](key)))
for answer in ["So 5 + 7 = 12", "The answer is 12.", "The answer is 12.50", "The answer is $1,200\n\nNext 5", "12 apples and 3 pears",
               "none", "", "Well.\n\nThe answer is 7", "x is 12\n\nlater 7", "The answer is twelve", "0012"]:
    for key in ["The answer is 12", "7", "1200", "3", "none"]:
        add("exam-number", answer, [key], exact(exam["process_math"](answer), exam["process_math"](key)))
for answer in ["The output is [1, 2]", "[1, 2]", "the final output is 'a' 3.0 and more words here", "It prints: a 3 ", "", "  x\n\ny",
               "the value of x will be [ [1], [2] ]", "a 3 and a lot of other words after it that hide it"]:
    for key in ["[1,2]", "a 3", "[[1], [2]]", "x y", "3"]:
        add("exam-code", answer, [key], exact(exam["process_output_code"](answer, key), exam["process_gt_code"](key)))
for answer in ["The topic is The role of art.", "the role ofart", "art", "", "12", "12.0", "A"]:
    for key in ["the role of art", "12", "A"]:
        add("exam-text", answer, [key], exact(answer, key))

json.dump(cases, sys.stdout, ensure_ascii=False, separators=(",", ":"))

//! What fields go by: the names of questions, options, golds and ids in the files that people
//! pass on, compared without case, blanks, dashes and underscores.

/// Names of the first rank are questions wherever they stand, those of the second only where
/// none of the first is.
pub const QUESTION_NAMES: [&[&str]; 2] = [
    &[
        "question",
        "questiontext",
        "problem",
        "problemstatement",
        "prompt",
        "query",
        "questionstem",
    ],
    &[
        "instruction",
        "input",
        "text",
        "stem",
        "sentence",
        "task",
        "q",
    ],
];
pub const MESSAGES_NAMES: [&str; 8] = [
    "messages",
    "conversation",
    "conversations",
    "chat",
    "turns",
    "prompt",
    "input",
    "question",
];
pub const ID_NAMES: [&str; 14] = [
    "id",
    "uid",
    "uuid",
    "guid",
    "qid",
    "questionid",
    "taskid",
    "problemid",
    "exampleid",
    "sampleid",
    "itemid",
    "rowid",
    "recordid",
    "promptid",
];
/// Names that are ids only where each row has its own value.
pub const WEAK_ID_NAMES: [&str; 5] = ["key", "idx", "index", "number", "row"];
pub const OPTIONS_NAMES: [&str; 7] = [
    "options",
    "choices",
    "answerchoices",
    "answeroptions",
    "candidates",
    "endings",
    "alternatives",
];
/// As with questions, the second rank counts only without the first.
pub const GOLD_NAMES: [&[&str]; 2] = [
    &[
        "answer",
        "gold",
        "target",
        "label",
        "expected",
        "expectedanswer",
        "correct",
        "correctanswer",
        "correctoption",
        "correctchoice",
        "finalanswer",
        "groundtruth",
        "reference",
        "referenceanswer",
        "goldanswer",
        "goldlabel",
        "answerkey",
        "answerletter",
        "answeridx",
        "answerindex",
        "correctidx",
        "correctindex",
        "correctanswerindex",
        "correctanswerletter",
        "goldidx",
        "goldindex",
        "labelidx",
        "bestanswer",
        "finaldecision",
        "exactanswer",
        "cop",
    ],
    &[
        "solution",
        "expectedoutput",
        "output",
        "response",
        "completion",
    ],
];
/// What goes with a gold answer and gives it away.
const GOLD_ONLY_NAMES: [&str; 21] = [
    "answers",
    "answerstart",
    "references",
    "reasoning",
    "cot",
    "cotcontent",
    "chainofthought",
    "thought",
    "exp",
    "test",
    "tests",
    "testcases",
    "testlist",
    "testcode",
    "challengetestlist",
    "iscorrect",
    "labels",
    "targets",
    "targetscores",
    "longanswer",
    "shortanswer",
];
/// Beginnings of such names: `correct_answers`, `Incorrect Answer 1`, `distractor2`.
const GOLD_ONLY_BEGINNINGS: [&str; 9] = [
    "gold",
    "groundtruth",
    "correct",
    "incorrect",
    "wronganswer",
    "distractor",
    "canonicalsolution",
    "explanation",
    "rationale",
];
/// What a model wrote: a file with these and no question holds no prompts.
pub const REPLY_NAMES: [&str; 9] = [
    "completion",
    "completions",
    "response",
    "generation",
    "generations",
    "generatedtext",
    "prediction",
    "modeloutput",
    "output",
];
/// Fields that hold a row, or a part of one, as an object.
const WRAPPER_NAMES: [&str; 8] = [
    "question", "problem", "row", "doc", "item", "example", "record", "data",
];
pub const GROUP_NAMES: [&str; 4] = ["group", "family", "subject", "category"];

/// A field's name without case, blanks, dashes and underscores.
pub fn plain_name(name: &str) -> String {
    name.chars()
        .filter(|c| c.is_alphanumeric())
        .flat_map(char::to_lowercase)
        .collect()
}

/// What decides a field's part: its plain name, inside a wrapping object (`question.stem`,
/// `row.answer`) that of the inner field.
pub fn role_name(field: &str) -> String {
    match field.split_once('.') {
        Some((outer, inner)) if is_wrapper_name(outer) => plain_name(inner),
        _ => plain_name(field),
    }
}

/// Whether an object of this name is looked into for the parts of a row.
pub fn is_wrapper_name(name: &str) -> bool {
    WRAPPER_NAMES.contains(&plain_name(name).as_str())
}

/// Whether a column of this name may hold questions.
pub fn is_question_name(name: &str) -> bool {
    let name = plain_name(name);
    QUESTION_NAMES
        .iter()
        .any(|rank| rank.contains(&name.as_str()))
}

/// Whether a field of this name holds a gold answer or gives it away.
pub fn is_gold_name(name: &str) -> bool {
    let name = role_name(name);
    GOLD_NAMES.iter().any(|rank| rank.contains(&name.as_str()))
        || GOLD_ONLY_NAMES.contains(&name.as_str())
        || GOLD_ONLY_BEGINNINGS
            .iter()
            .any(|beginning| name.starts_with(beginning))
}

//! Templates against Jinja itself (`tests/golden/templates/make.py`), and those that mean harm.

use super::{super::Date, Clock, Template, Value};
use serde_json::Value as Json;

fn value(json: &Json) -> Value {
    match json {
        Json::Null => Value::None,
        Json::Bool(b) => Value::Bool(*b),
        Json::Number(n) => match n.as_i64() {
            Some(n) => Value::Int(n),
            None => Value::Float(n.as_f64().unwrap()),
        },
        Json::String(s) => Value::text(s),
        Json::Array(items) => Value::given_list(items.iter().map(value).collect()),
        Json::Object(entries) => {
            let entries = entries.iter().map(|(key, v)| (key.as_str(), value(v)));
            Value::given_map(entries.collect())
        }
    }
}

fn render(source: &str, variables: &Json) -> Result<String, String> {
    let date = Date {
        year: 2024,
        month: 7,
        day: 6,
    };
    let clock = |format: &str| date.format(format);
    let clock = Some(&clock as Clock<'_>);
    let variables = || {
        let entries = variables.as_object().unwrap().iter();
        entries
            .map(|(name, v)| (name.as_str().into(), value(v)))
            .collect()
    };
    let rendered =
        Template::new(source).and_then(|template| template.render(variables, clock, 0, 100_000));
    rendered.map_err(|fault| fault.to_string())
}

#[test]
fn templates_are_rendered_as_jinja_does() {
    let golden = include_str!("../../../tests/golden/templates/golden.json");
    let golden: Json = serde_json::from_str(golden).unwrap();
    let cases = golden["cases"].as_array().unwrap();
    assert!(cases.len() > 80);
    for case in cases {
        let source = case["source"].as_str().unwrap();
        let found = render(source, &golden["variables"]);
        match case["text"].as_str() {
            Some(expected) => assert_eq!(found.as_deref(), Ok(expected), "{source}"),
            None => assert!(found.is_err(), "{source}: {found:?}"),
        }
    }
}

/// The stack of who calls: little is left in the middle of other work.
const STACK: usize = 128 << 10;

#[test]
fn no_template_takes_the_time_the_memory_or_the_stack() {
    let n = 10_000;
    let many = |text: &str| text.repeat(n);
    let doubling = "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(60) %}\
        {% set ns.a = [ns.a, ns.a] %}{% set ns.b = [ns.b, ns.b] %}{% endfor %}";
    let nesting = "{% set ns = namespace(a=[1]) %}{% for i in range(37733) %}\
        {% set ns.a = [ns.a] %}{% endfor %}";
    let long = "{% set a = 'a' * 1000000 %}{% for i in range(99999) %}";
    let mut sources = vec![
        // Deep sources.
        format!("{{{{ {}1{} }}}}", many("("), many(")")),
        format!("{{{{ {}{} }}}}", many("["), many("]")),
        format!("{{{{ {}1{} }}}}", many("{1:"), many("}")),
        format!("{{{{ a{}1{} }}}}", many("[a"), many("]")),
        format!("{{{{ {}1 }}}}", many("not ")),
        format!("{{{{ {}1 }}}}", many("-")),
        format!("{{{{ 1{} }}}}", many("+1")),
        format!("{{{{ 1{} }}}}", many("~1")),
        format!("{{{{ 1{} }}}}", many(" and 1")),
        format!("{{{{ 1{} }}}}", many(" < 1")),
        format!("{{{{ 1{} }}}}", many("|abs")),
        format!("{{{{ 1{} }}}}", many(" is defined")),
        format!("{{{{ a{} }}}}", many(".a")),
        format!("{{{{ a{} }}}}", many("()")),
        format!("{{{{ {}1 }}}}", many("1 if 0 else ")),
        many("{% if 1 %}"),
        many("{% for i in [1] %}"),
        many("{%"),
        many("{{"),
        "x".repeat(1 << 20),
        // Calls without end.
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f() %}{{ g() }}{% endmacro %}{% macro g() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}".into(),
        "{% macro f() %}{% call f() %}x{% endcall %}{% endmacro %}{{ f() }}".into(),
        format!(
            "{{% macro f() %}}{{{{ caller() }}}}{{{{ caller() }}}}{{% endmacro %}}{}x{}",
            "{% call f() %}".repeat(40),
            "{% endcall %}".repeat(40)
        ),
        // Values that hold themselves.
        "{% set ns = namespace(a=1) %}{% set ns.a = ns %}{{ {ns: 1} }}".into(),
        "{% set ns = namespace(a=1) %}{% set ns.a = [ns] %}{{ ns }}".into(),
        "{% set ns = namespace(a=1) %}{% set ns.a = {'a': ns} %}{{ ns }}".into(),
        "{% for i in [1] %}{{ [loop] }}{% endfor %}".into(),
        "{% for i in [1, 2] %}{{ loop.changed(loop) }}{% endfor %}".into(),
        // Texts and lists that grow.
        format!("{{% set a = 'aaaa' %}}{}", "{% set a = a ~ a %}".repeat(60)),
        format!("{{% set a = 'aaaa' %}}{}", "{% set a %}{{ a }}{{ a }}{% endset %}".repeat(60)),
        "{% set ns = namespace(a=[1]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}{% endfor %}".into(),
        "{% set ns = namespace(a=[]) %}{% for i in range(99999) %}{% set ns.a = ns.a + [i] %}{% endfor %}".into(),
        "{% set ns = namespace(a={}) %}{% for i in range(99999) %}\
            {% set ns.a = dict(ns.a.items() | list + [(i, i)]) %}{% endfor %}".into(),
        "{% for i in range(99999) %}{{ 'a' * 1000 }}{% endfor %}".into(),
        // Lengths that a template says.
        "{{ 'a' * 1000000000000 }}".into(),
        "{{ [1] * 1000000000000 }}".into(),
        "{{ range(1000000000000) }}".into(),
        "{{ '{:>4000000000}'.format('x') }}".into(),
        "{{ '{0:.1000000000f}'.format(1.5) }}".into(),
        "{{ '%999999999d' % 1 }}".into(),
        "{{ '%.999999999f' % 1.5 }}".into(),
        "{{ 'a' | center(1000000000) }}".into(),
        "{{ 'a'.ljust(1000000000) }}".into(),
        "{{ 'a'.zfill(10**12) }}".into(),
        "{{ ('\\t' * 1000).expandtabs(10**9) }}".into(),
        "{{ ('\\n' * 100000) | indent(100000) }}".into(),
        "{{ [1] | batch(10**9, 'x') }}".into(),
        "{{ raise_exception('x' * 100000000) }}".into(),
        // Texts that are taken apart, and work that hides in one operation.
        "{{ ('x ' * 10000000).split() | length }}".into(),
        "{{ ('a' * 10000000) | list | length }}".into(),
        "{{ ('\\n' * 10000000).splitlines() | length }}".into(),
        "{% set a = 'a' * 100000 %}{{ a.replace('a', a) }}".into(),
        "{% set a = 'a' * 100000 %}{{ a.join(a) }}".into(),
        "{% set a = 'a' * 1000000 %}{{ a.strip('b' * 1000000 ~ 'a') }}".into(),
        "{{ range(99999) | unique | list | length }}".into(),
        "{{ [1, 'a', none, [1]] | sort }}".into(),
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}".into(),
        "{% set l = range(99999) %}{% for i in l %}{% set b = l[1:] %}{% endfor %}".into(),
        // Numbers at their ends.
        "{{ 999999999999999999999999 }}".into(),
        "{{ 10**18 * 10 }}".into(),
        "{{ (-9223372036854775807 - 1) | abs }}".into(),
        "{{ (-9223372036854775807 - 1) // -1 }}".into(),
        "{{ -(-9223372036854775807 - 1) }}".into(),
        "{{ range(-9223372036854775807 - 1, 9223372036854775807) }}".into(),
        // Formats that are none.
        "{{ '{0[a]é}'.format({'a': 1}) }}".into(),
        "{{ '%é' % 1 }}".into(),
        "{{ '%(' % {'a': 1} }}".into(),
        "{{ '{:{}}'.format(1, 2) }}".into(),
        "{{ '{' }}{{ '{'.format() }}".into(),
    ];
    for end in [
        "{{ ns.a }}",
        "{{ ns.a == ns.b }}",
        "{{ ns.a < ns.b }}",
        "{{ ns.a in [ns.b] }}",
        "{{ {ns.a: 1} }}",
        "{{ ns.a | tojson }}",
        "{{ ns.a | pprint }}",
        "{{ ns.a | string | length }}",
        "{{ ns.a | join(',') }}",
        "{{ ns.a | replace('1', '2') }}",
        "{{ '%s' % [ns.a] }}",
        "{{ '{}'.format(ns.a) }}",
        "{{ [ns.a, ns.b] | sort }}",
        "{{ [ns.a, ns.b] | unique | list }}",
        "{{ [ns.b].count(ns.a) }}",
    ] {
        sources.push(format!("{doubling}{end}"));
        sources.push(format!("{nesting}{end}"));
    }
    for inner in [
        "a[999998]",
        "a is lower",
        "a | length",
        "a == a ~ ''",
        "a | wordcount",
        "a.find('b')",
        "{a: 1}[a]",
        "a.strip()",
        "a | reverse",
        "a | e",
        "a in a",
        "a | tojson",
        "a | title",
    ] {
        sources.push(format!("{long}{{% set b = {inner} %}}{{% endfor %}}"));
    }
    let variables = serde_json::json!({"messages": [{"role": "user", "content": "hi"}]});
    let run = move || {
        for source in &sources {
            let found = render(source, &variables);
            let head: String = source.chars().take(200).collect();
            let message = found.expect_err(&head);
            assert!(message.len() < 4000, "{head}");
        }
    };
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(run);
    thread.unwrap().join().unwrap();
}

#[test]
fn the_deepest_that_is_allowed_fits_the_stack() {
    let n = 50;
    let variables = serde_json::json!({});
    let sources = [
        format!("{{{{ {}1{} }}}}", "(".repeat(n), ")".repeat(n)),
        format!("{{{{ {}1{} | tojson }}}}", "[".repeat(n), "]".repeat(n)),
        format!("{}x{}", "{% if 1 %}".repeat(n), "{% endif %}".repeat(n)),
        "{% macro f(n) %}{% if n > 0 %}{% for i in [1] %}{{ f(n - 1) }}{% endfor %}{% else %}x{% endif %}{% endmacro %}{{ f(25) }}".into(),
        format!("{}{{{{ f(1) }}}}", "{% macro f(n) %}{% if n < 24 %}{{ f(n + 1) ~ [[[n]]] }}{% endif %}{% endmacro %}"),
    ];
    let run = move || {
        for source in &sources {
            render(source, &variables).unwrap();
        }
    };
    let thread = std::thread::Builder::new().stack_size(STACK).spawn(run);
    thread.unwrap().join().unwrap();
}

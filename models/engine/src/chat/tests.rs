use super::*;

fn message(role: &str, content: &str) -> ChatMessage {
    ChatMessage {
        role: role.to_owned(),
        content: content.to_owned(),
    }
}

fn render(source: &str, messages: &[ChatMessage]) -> Result<String, ChatError> {
    ChatTemplate::new(source, [("bos_token", "<s>"), ("eos_token", "</s>")])?.render(messages, true)
}

/// An expression over a text `t`, as a template prints it.
fn expression(expression: &str, text: &str) -> String {
    let source = format!("{{% set t = messages[0].content %}}{{{{ {expression} }}}}");
    render(&source, &[message("user", text)])
        .unwrap_or_else(|error| panic!("{expression}: {error}"))
}

const CHATML: &str = "{% for message in messages %}\n\
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' -}}\n\
    {% endfor %}\n\
    {% if add_generation_prompt %}\n\
    {{- '<|im_start|>assistant\\n' -}}\n\
    {% endif %}\n";

#[test]
fn chatml() {
    let text = render(
        CHATML,
        &[
            message("system", "Be short."),
            message("user", "Hi <b> & you"),
        ],
    )
    .unwrap();
    assert_eq!(
        text,
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\nHi <b> & you<|im_end|>\n<|im_start|>assistant\n"
    );
}

/// The shape of Llama 2's and Mistral's templates: roles must alternate, a system text goes into the first user turn.
const INSTRUCT: &str = r"
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('After the optional system message, conversation roles must alternate user/assistant') }}
    {%- endif %}
    {%- if message['role'] == 'user' %}
        {%- if loop.first and system_message is defined %}
            {{- ' [INST] ' + system_message + '\n\n' + message['content'] + ' [/INST]' }}
        {%- else %}
            {{- ' [INST] ' + message['content'].strip() + ' [/INST]' }}
        {%- endif %}
    {%- else %}
        {%- generation %}{{- ' ' + message['content'] + eos_token }}{%- endgeneration %}
    {%- endif %}
{%- endfor %}";

#[test]
fn instruct_template_and_its_refusal() {
    let turns = [
        message("system", " s "),
        message("user", "a"),
        message("assistant", "b"),
        message("user", " c "),
    ];
    assert_eq!(
        render(INSTRUCT, &turns).unwrap(),
        "<s> [INST] s\n\na [/INST] b</s> [INST] c [/INST]"
    );
    let error = render(INSTRUCT, &[message("assistant", "b")]).unwrap_err();
    assert!(
        matches!(&error, ChatError::Refused(text) if text.starts_with("After the optional")),
        "{error}"
    );
}

#[test]
fn a_refusal_inside_a_macro_is_a_refusal() {
    let source = "{% macro m() %}{{ raise_exception('no') }}{% endmacro %}{{ m() }}";
    assert!(
        matches!(render(source, &[message("user", "a")]), Err(ChatError::Refused(text)) if text == "no")
    );
}

#[test]
fn broken_templates_name_their_line() {
    let error = ChatTemplate::new("a\nb\n{% if x %}", []).unwrap_err();
    assert!(
        matches!(error, ChatError::Template { line: 3, .. }),
        "{error}"
    );
    let error = render(
        "a\n{{ messages[0].content.frobnicate() }}",
        &[message("user", "x")],
    )
    .unwrap_err();
    assert!(
        error.to_string().contains("frobnicate") && error.to_string().contains("line 2"),
        "{error}"
    );
    assert!(matches!(render(CHATML, &[]), Err(ChatError::NoMessages)));
}

#[test]
fn methods_are_pythons() {
    let cases = [
        ("t.strip()", "  a b ", "a b"),
        ("t.lstrip('xa')", "axbx", "bx"),
        ("t.rstrip()", " a\n", " a"),
        (
            "t.split('</think>')[-1].lstrip('\\n')",
            "<think>x</think>\n\ny",
            "y",
        ),
        ("t.split()|join('|')", " a  b\tc ", "a|b|c"),
        ("t.split(None, 1)|join('|')", " a  b c ", "a|b c "),
        ("t.split('-', 1)|join('|')", "a-b-c", "a|b-c"),
        ("t.rsplit('-', 1)|join('|')", "a-b-c", "a-b|c"),
        ("t.rsplit(None, 1)|join('|')", "a b c ", "a b|c"),
        ("t.startswith('a')", "abc", "True"),
        ("t.endswith(('x', 'c'))", "abc", "True"),
        ("t.upper() + t.lower() + t.capitalize()", "aB", "ABabAb"),
        ("t.title()", "ab cD-e", "Ab Cd-E"),
        ("t.replace('a', 'b')", "aXa", "bXb"),
        ("t.replace('a', 'b', 1)", "aXa", "bXa"),
        ("t.find('c')", "éc", "1"),
        ("t.rfind('z')", "éc", "-1"),
        ("t.count('a')", "banana", "3"),
        ("', '.join(['x', t])", "y", "x, y"),
        ("t.isdigit()", "12", "True"),
        ("t.removeprefix('a')", "ab", "b"),
        ("t[::-1]", "abc", "cba"),
        ("{'a': 1}.get('b', t)", "d", "d"),
        ("{'a': 1}.get('b') is none", "d", "True"),
        (
            "{'a': 1, 'b': t}.items()|map('join', '=')|join(';')",
            "2",
            "a=1;b=2",
        ),
        ("{'a': 1, 'b': 2}.keys()|join", "", "ab"),
        ("{'a': 1, 'b': 2}.values()|join", "", "12"),
        ("['a', t, t].count(t)", "b", "2"),
    ];
    for (source, text, expected) in cases {
        assert_eq!(expression(source, text), expected, "{source}");
    }
}

#[test]
fn json_is_pythons() {
    assert_eq!(
        expression("{'a': [1, 2.5, none], 'é': t}|tojson", "<&>\""),
        r#"{"a": [1, 2.5, null], "é": "<&>\""}"#
    );
    assert_eq!(
        expression("{'a': [1]}|tojson(indent=4)", ""),
        "{\n    \"a\": [\n        1\n    ]\n}"
    );
    assert_eq!(expression("[]|tojson(ensure_ascii=false)", ""), "[]");
    assert_eq!(
        expression("messages|tojson", "x"),
        r#"[{"role": "user", "content": "x"}]"#
    );
}

#[test]
fn the_time_can_be_printed() {
    let year: u32 = expression("strftime_now('%Y')", "").parse().unwrap();
    assert!((2024..2200).contains(&year));
    assert_eq!(expression("strftime_now('100%%')", ""), "100%");
}

#[test]
fn namespaces_loop_controls_and_neighbours_work() {
    let source = "{% set ns = namespace(n=0) %}{% for m in messages %}{% if m.role == 'system' %}{% continue %}{% endif %}\
        {% set ns.n = ns.n + 1 %}{% if loop.previtem is defined and loop.previtem.role == m.role %}!{% endif %}{% endfor %}{{ ns.n }}";
    let turns = [
        message("system", ""),
        message("user", ""),
        message("user", ""),
    ];
    assert_eq!(render(source, &turns).unwrap(), "!2");
}

/// transformers passes None for both; templates tell that apart from an empty list and from nothing at all.
#[test]
fn tools_and_documents_are_none() {
    let source = "{{ tools is none }} {{ documents is none }} {% if tools is not none %}tools!{% endif %}\
                  {% if tools is defined and documents %}documents!{% endif %}";
    let text = render(source, &[message("user", "Hi")]).unwrap();
    assert_eq!(text.to_lowercase(), "true true ");
}

//! `[http]` and its routes.

use std::collections::BTreeMap;

use super::load::{Checks, Declared};
use super::{Action, Http, Method, Route, Template, listen, stages};
use crate::diagnostics::{Problem, Span, suggestion};
use crate::manifest::{HttpSection, ProduceSection, ReadSection, RouteSection, Text};

const DEFAULT_MAX_BODY: usize = 1 << 20;
/// Accepted: the record is in the log, and nobody has processed it yet.
const DEFAULT_STATUS: u16 = 202;
const NO_CONTENT: u16 = 204;
/// Characters of a read route's key: all of them are held against each other's.
const MAX_KEY: usize = 512;

const METHODS: &[(&str, Method)] = &[
    ("GET", Method::Get),
    ("POST", Method::Post),
    ("PUT", Method::Put),
    ("PATCH", Method::Patch),
    ("DELETE", Method::Delete),
];

pub(super) fn http(
    checks: &Checks<'_>,
    declared: &Declared,
    section: &HttpSection,
) -> Option<Http> {
    let listen = section
        .listen
        .as_ref()
        .and_then(|text| listen::address(checks, text));
    let routes: Vec<_> = section
        .routes
        .iter()
        .map(|r| route(checks, declared, r))
        .collect();
    check_patterns(checks, &section.routes);
    check_templates(checks, &section.routes);
    Some(Http {
        listen: listen?,
        max_body: section
            .max_body
            .as_ref()
            .and_then(|size| usize::try_from(size.value).ok())
            .unwrap_or(DEFAULT_MAX_BODY),
        routes: routes.into_iter().collect::<Option<_>>()?,
    })
}

fn route(checks: &Checks<'_>, declared: &Declared, section: &RouteSection) -> Option<Route> {
    let method = section
        .method
        .as_ref()
        .and_then(|text| method(checks, text));
    let path = section.path.as_ref().and_then(|text| path(checks, text));
    let parameters = path.as_deref().map(parameters);
    let action = match (&section.produce, &section.read) {
        (Some(produce), None) => {
            check_produce_route(checks, section, method, parameters.as_deref());
            produce_action(checks, declared, section, produce)
        }
        (None, Some(read)) => {
            check_read_route(checks, section, method);
            read_action(checks, declared, read, parameters.as_deref())
        }
        (Some(produce), Some(_)) => {
            checks.report(
                Problem::at(&produce.span, "a route has either `produce` or `read`")
                    .help("leave one out, or make it two routes"),
            );
            None
        }
        (None, None) => {
            checks.report(Problem::at(&section.span, "the route does nothing").help(
                "add `produce = { topic = \"…\", … }` or `read = { redis = \"…\", key = \"…\" }`",
            ));
            None
        }
    };
    Some(Route {
        path: path?,
        method: method?,
        action: action?,
    })
}

fn method(checks: &Checks<'_>, text: &Text) -> Option<Method> {
    let found = METHODS
        .iter()
        .find(|(word, _)| *word == text.value)
        .map(|(_, method)| *method);
    if found.is_none() {
        let words = METHODS.iter().map(|(word, _)| *word);
        let help = suggestion(&text.value, words, |all| format!("it is one of {all}"));
        checks.report(
            Problem::at(
                &text.span,
                format!("a route can't have the method `{}`", text.shown()),
            )
            .help(help),
        );
    }
    found
}

/// A path of literal segments and `{name}`s.
fn path(checks: &Checks<'_>, text: &Text) -> Option<String> {
    let wrong = path_fault(&text.value);
    if let Some(why) = wrong {
        checks.report(
            Problem::at(
                &text.span,
                format!("`{}` can't be the path of a route", text.shown()),
            )
            .label(why)
            .help(
                "write segments of plain characters or one `{name}` each, such as `/post/{slug}`",
            ),
        );
        return None;
    }
    names_are_written(checks, text).then(|| text.value.clone())
}

/// Whether no `{name}` comes from an environment variable: messages show names, and what a variable holds may be a secret.
fn names_are_written(checks: &Checks<'_>, text: &Text) -> bool {
    let shown = text.shown().replace("${", "");
    let mut names = text.value.split('{').skip(1);
    let written = names.all(|from| {
        let name = from.split('}').next().unwrap_or_default();
        shown.contains(&format!("{{{name}}}"))
    });
    if text.shown() == text.value || written {
        return true;
    }
    checks.report(
        Problem::at(
            &text.span,
            format!(
                "a `{{name}}` of `{}` comes from an environment variable",
                text.shown()
            ),
        )
        .help("write each `{name}` itself; what is between them may come from a variable"),
    );
    false
}

fn path_fault(path: &str) -> Option<&'static str> {
    if !path.starts_with('/') {
        return Some("it does not begin with `/`");
    }
    if !path
        .chars()
        .all(|c| c.is_ascii_graphic() && !"?#".contains(c))
    {
        return Some("a space, `?`, `#` or a character beyond ASCII");
    }
    let plain = |segment: &str| !segment.contains(['{', '}']);
    let parameter = |segment: &str| {
        segment
            .strip_prefix('{')
            .and_then(|rest| rest.strip_suffix('}'))
            .is_some_and(is_parameter)
    };
    if !path
        .split('/')
        .all(|segment| plain(segment) || parameter(segment))
    {
        return Some("a `{name}` takes the whole segment");
    }
    let names = parameters(path);
    let repeated = names
        .iter()
        .enumerate()
        .any(|(i, name)| names[..i].contains(name));
    repeated.then_some("a `{name}` stands there twice")
}

fn is_parameter(name: &str) -> bool {
    !name.is_empty()
        && name
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
}

/// The `{name}`s of a path.
fn parameters(path: &str) -> Vec<&str> {
    path.split('/')
        .filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'))
        .collect()
}

fn check_produce_route(
    checks: &Checks<'_>,
    section: &RouteSection,
    method: Option<Method>,
    parameters: Option<&[&str]>,
) {
    if let (Some(Method::Get), Some(text)) = (method, &section.method) {
        checks.report(
            Problem::at(
                &text.span,
                "a route that produces can't have the method `GET`",
            )
            .label("a GET changes nothing, and clients repeat it freely")
            .help("write `POST`, `PUT`, `PATCH` or `DELETE`"),
        );
    }
    if let (Some([name, ..]), Some(text)) = (parameters, &section.path) {
        checks.report(
            Problem::at(&text.span, format!("nothing would come of `{{{name}}}`"))
                .label("a route that produces takes the body's fields alone")
                .help(format!(
                    "leave it out of the path, and add \"{name}\" to `fields`"
                )),
        );
    }
    let no_content = section
        .status
        .as_ref()
        .is_some_and(|status| status.value == i64::from(NO_CONTENT));
    if let Some(body) = section
        .body
        .as_ref()
        .filter(|body| no_content && !body.value.is_empty())
    {
        checks.report(
            Problem::at(&body.span, "an answer with status 204 has no body")
                .help("leave `body` out, or take another status, such as 200"),
        );
    }
}

fn produce_action(
    checks: &Checks<'_>,
    declared: &Declared,
    section: &RouteSection,
    produce: &ProduceSection,
) -> Option<Action> {
    let topic = produce
        .topic
        .as_ref()
        .filter(|topic| is_declared(checks, declared, topic));
    let fields = check_fields(checks, produce);
    let key = match &produce.key {
        Some(key) => key_field(checks, produce, key).map(Some),
        None => Some(None),
    };
    let values = |list: &[Text]| list.iter().map(|text| text.value.clone()).collect();
    fields.then_some(Action::Produce {
        topic: topic?.value.clone(),
        key: key?,
        fields: values(&produce.fields),
        generate: values(&produce.generate),
        status: section
            .status
            .as_ref()
            .and_then(|status| u16::try_from(status.value).ok())
            .unwrap_or(DEFAULT_STATUS),
        body: section
            .body
            .as_ref()
            .map(|body| body.value.clone())
            .unwrap_or_default(),
    })
}

fn is_declared(checks: &Checks<'_>, declared: &Declared, topic: &Text) -> bool {
    let known = declared.topics.contains(&topic.value);
    if !known {
        let help = suggestion(
            &topic.value,
            declared.topics.iter().map(String::as_str),
            |_| format!("declare it: `[topics.\"{}\"]`", topic.shown()),
        );
        checks.report(
            Problem::at(
                &topic.span,
                format!(
                    "the route produces to the topic `{}`, which is not declared",
                    topic.shown()
                ),
            )
            .help(help),
        );
    }
    known
}

/// Whether the record's fields make sense together.
fn check_fields(checks: &Checks<'_>, produce: &ProduceSection) -> bool {
    let all: Vec<Text> = produce
        .fields
        .iter()
        .chain(&produce.generate)
        .cloned()
        .collect();
    checks.no_repeats(&all);
    let mut good = true;
    if all.is_empty() {
        checks.report(
            Problem::at(&produce.span, "the record would have no fields")
                .help("name those that the body must have: `fields = [\"title\"]`"),
        );
        good = false;
    }
    // They become header names, `stagehost-uid`, which have no upper case.
    for (at, name) in produce.generate.iter().enumerate() {
        let is_same = |other: &&Text| {
            other.value != name.value && other.value.eq_ignore_ascii_case(&name.value)
        };
        if let Some(first) = produce.generate[..at].iter().find(is_same) {
            checks.report(
                Problem::at(
                    &name.span,
                    format!(
                        "`{}` is generated under a name that differs in case only",
                        name.shown()
                    ),
                )
                .also(&first.span, "the other one")
                .help("the answer carries both as one header: rename one of them"),
            );
            good = false;
        }
    }
    let bad = produce
        .generate
        .iter()
        .filter(|name| !is_parameter(&name.value));
    for name in bad {
        checks.report(
            Problem::at(
                &name.span,
                format!("`{}` can't be generated under this name", name.shown()),
            )
            .label("the answer carries it as a header")
            .help("take letters, digits, `-` and `_`"),
        );
        good = false;
    }
    good
}

fn key_field(checks: &Checks<'_>, produce: &ProduceSection, key: &Text) -> Option<String> {
    let names = || produce.fields.iter().chain(&produce.generate);
    if names().any(|name| name.value == key.value) {
        return Some(key.value.clone());
    }
    let help = suggestion(&key.value, names().map(Text::shown), |all| {
        format!("name a field of `fields` or `generate`: {all}")
    });
    checks.report(
        Problem::at(
            &key.span,
            format!("the record's key `{}` is none of its fields", key.shown()),
        )
        .help(help),
    );
    None
}

fn check_read_route(checks: &Checks<'_>, section: &RouteSection, method: Option<Method>) {
    if let (Some(text), true) = (&section.method, method.is_some_and(|m| m != Method::Get)) {
        checks.report(
            Problem::at(
                &text.span,
                format!(
                    "a route that reads can't have the method `{}`",
                    text.shown()
                ),
            )
            .help("write `GET`"),
        );
    }
    let misplaced: [(&str, Option<&Span>); 2] = [
        ("status", section.status.as_ref().map(|s| &s.span)),
        ("body", section.body.as_ref().map(|b| &b.span)),
    ];
    for (key, span) in misplaced {
        if let Some(span) = span {
            checks.report(
                Problem::at(span, format!("a route that reads has no `{key}`"))
                    .label("it answers 200 and the value, or 404")
                    .help("leave it out"),
            );
        }
    }
}

fn read_action(
    checks: &Checks<'_>,
    declared: &Declared,
    read: &ReadSection,
    parameters: Option<&[&str]>,
) -> Option<Action> {
    let store = read
        .redis
        .as_ref()
        .filter(|store| stages::is_store(checks, "redis", &declared.redis, store));
    let key = read
        .key
        .as_ref()
        .filter(|key| check_key(checks, key, parameters));
    Some(Action::Read {
        store: store?.value.clone(),
        key: Template::parse(&key?.value),
    })
}

/// Whether every `{name}` of a key stands in the path, as far as the path is known, and apart from the others.
fn check_key(checks: &Checks<'_>, key: &Text, parameters: Option<&[&str]>) -> bool {
    if key.value.chars().count() > MAX_KEY {
        checks.report(
            Problem::at(
                &key.span,
                format!("the key has more than {MAX_KEY} characters"),
            )
            .help("take a shorter one"),
        );
        return false;
    }
    if !names_are_written(checks, key) {
        return false;
    }
    let mut rest = key.value.as_str();
    let mut good = true;
    while let Some((_, from)) = rest.split_once('{') {
        let Some((name, after)) = from.split_once('}') else {
            checks.report(
                Problem::at(&key.span, "a `{` has no `}`")
                    .help("write the name of a path's segment: `post:{slug}`"),
            );
            return false;
        };
        rest = after;
        let Some(parameters) = parameters.filter(|known| !known.contains(&name)) else {
            continue;
        };
        let help = if parameters.is_empty() {
            format!("write it into the path, as `/…/{{{name}}}`")
        } else {
            suggestion(name, parameters.iter().copied(), |all| {
                format!("the path has {all}")
            })
        };
        checks.report(Problem::at(&key.span, format!("the path has no `{{{name}}}`")).help(help));
        good = false;
    }
    if let Some((one, other)) = Template::parse(&key.value).confused_names() {
        checks.report(
            Problem::at(
                &key.span,
                format!("nothing separates `{{{one}}}` from `{{{other}}}`"),
            )
            .label("different paths would make the same key")
            .help(format!(
                "put a sign between them that neither can have: `{{{one}}}:{{{other}}}`"
            )),
        );
        good = false;
    }
    good
}

/// Reports read routes of which one could make the other's keys. What has no `{name}` is one key, which its route has.
fn check_templates(checks: &Checks<'_>, routes: &[RouteSection]) {
    let read = |route: &'_ RouteSection| -> Option<(String, Text, Template)> {
        let read = route.read.as_ref()?;
        let (store, key) = (read.redis.as_ref()?, read.key.as_ref()?);
        let template = Template::parse(&key.value);
        let is_short = key.value.chars().count() <= MAX_KEY;
        (is_short && !template.is_plain()).then(|| (store.value.clone(), key.clone(), template))
    };
    let reads: Vec<_> = routes.iter().filter_map(read).collect();
    for (at, (store, key, template)) in reads.iter().enumerate() {
        let mut before = reads[..at].iter();
        let clash = before.find(|(other_store, _, other)| {
            other_store == store && !other.is_like(template) && other.overlaps(template)
        });
        let Some((_, other, _)) = clash else {
            continue;
        };
        checks.report(
            Problem::at(
                &key.span,
                format!("`{}` and `{}` can make the same key", key.shown(), other.shown()),
            )
            .also(&other.span, "the other one")
            .help("begin each with a text of its own, such as `post:` and `tag:`; what a `{name}` stands for has no `:` then"),
        );
    }
}

/// Reports routes that would answer the same requests.
fn check_patterns(checks: &Checks<'_>, routes: &[RouteSection]) {
    let mut routers: BTreeMap<&str, matchit::Router<()>> = BTreeMap::new();
    let mut seen: BTreeMap<(&str, &str), &Text> = BTreeMap::new();
    for route in routes {
        let (Some(path), Some(method)) = (&route.path, &route.method) else {
            continue;
        };
        if path_fault(&path.value).is_some() {
            continue;
        }
        let router = routers.entry(&method.value).or_default();
        if let Err(matchit::InsertError::Conflict { with }) = router.insert(path.value.clone(), ())
        {
            let name = format!("{} {}", method.shown(), path.shown());
            let message = if with == path.value {
                format!("there are two routes `{name}`")
            } else {
                format!("the route `{name}` would answer the same requests as `{with}`")
            };
            let mut problem = Problem::at(&path.span, message).help("leave one of them out");
            if let Some(first) = seen.get(&(method.value.as_str(), with.as_str())) {
                problem = problem.also(&first.span, "the first one");
            }
            checks.report(problem);
        }
        seen.entry((&method.value, &path.value)).or_insert(path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tells_paths_of_routes_from_other_text() {
        for good in [
            "/",
            "/post",
            "/post/{slug}",
            "/post/uid/{uid}",
            "/{a}/{b-c}/d.json",
            "/a%20b",
        ] {
            assert_eq!(path_fault(good), None, "{good}");
        }
        for bad in [
            "", "post", "/a b", "/a?b", "/ü", "/{}", "/{a", "/a}", "/{a}{b}", "/x{a}", "/{*rest}",
            "/{a}/{a}",
        ] {
            assert!(path_fault(bad).is_some(), "{bad}");
        }
    }
}

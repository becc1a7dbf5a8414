//! From method and path to a route. One tree of paths a method, so that the same path may name its
//! parts differently for another method.

use std::collections::BTreeMap;

use hyper::Method;
use matchit::Params;

use crate::pipeline;

/// Routes of some kind.
pub(super) struct Router<R> {
    methods: BTreeMap<pipeline::Method, matchit::Router<R>>,
}

/// What there is for a method and path.
pub(super) enum Found<'r, 'p, R> {
    /// The route, with the path's named parts as they are written.
    Route(&'r R, Params<'r, 'p>),
    /// One of the path's routes, and the methods of all, comma-separated.
    OtherMethods(&'r R, String),
    Nothing,
}

impl<R> Default for Router<R> {
    fn default() -> Self {
        Self {
            methods: BTreeMap::new(),
        }
    }
}

impl<R> Router<R> {
    /// Adds a route; fails when another already takes its requests.
    pub(super) fn insert(
        &mut self,
        method: pipeline::Method,
        path: &str,
        route: R,
    ) -> anyhow::Result<()> {
        self.methods
            .entry(method)
            .or_default()
            .insert(path, route)
            .map_err(|error| anyhow::anyhow!("the HTTP route {} {path}: {error}", name(method)))
    }

    /// The route for a request. HEAD is answered as GET.
    pub(super) fn find<'r, 'p>(&'r self, method: &Method, path: &'p str) -> Found<'r, 'p, R> {
        let wanted = if method == Method::HEAD {
            "GET"
        } else {
            method.as_str()
        };
        let mut allow = Vec::new();
        let mut other = None;
        for (&method, paths) in &self.methods {
            let Ok(found) = paths.at(path) else {
                continue;
            };
            if name(method) == wanted {
                return Found::Route(found.value, found.params);
            }
            allow.push(name(method));
            if method == pipeline::Method::Get {
                allow.push("HEAD");
            }
            other = Some(found.value);
        }
        match other {
            Some(route) => Found::OtherMethods(route, allow.join(", ")),
            None => Found::Nothing,
        }
    }
}

fn name(method: pipeline::Method) -> &'static str {
    match method {
        pipeline::Method::Get => "GET",
        pipeline::Method::Post => "POST",
        pipeline::Method::Put => "PUT",
        pipeline::Method::Patch => "PATCH",
        pipeline::Method::Delete => "DELETE",
    }
}

//! What wit-bindgen makes of `wit/`: the worlds share one set of types, so that a stage of either
//! kind uses the same helpers.

/// The world `stage`, and the types of both.
pub mod stage {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "stage",
        generate_all,
        pub_export_macro: true,
        additional_derives: [PartialEq],
    });
}

/// The world `batch-stage`, over the types of `stage`.
pub mod batch_stage {
    wit_bindgen::generate!({
        path: "../../wit",
        world: "batch-stage",
        pub_export_macro: true,
        with: {
            "stagehost:stage/types@0.1.0": crate::bindings::stage::stagehost::stage::types,
            "stagehost:stage/producer@0.1.0": crate::bindings::stage::stagehost::stage::producer,
            "stagehost:stage/sql@0.1.0": crate::bindings::stage::stagehost::stage::sql,
            "stagehost:stage/redis@0.1.0": crate::bindings::stage::stagehost::stage::redis,
            "wasi:config/store@0.2.0-rc.1": crate::bindings::stage::wasi::config::store,
            "wasi:logging/logging@0.1.0-draft": crate::bindings::stage::wasi::logging::logging,
        },
    });
}

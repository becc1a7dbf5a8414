//! TLS, SASL and compression, with a Kafka listener that asks for them.

use std::sync::Arc;

use crate::support::{Host, Log, component, server, unique};

fn pipeline(properties: &str, input: &str, output: &str, group: &str) -> String {
    let (brokers, component) = (server("KAFKA_SASL_BROKERS"), component("test-echo"));
    let authority = server("KAFKA_CA_FILE");
    format!(
        r#"
        name = "secure"
        admin.listen = "127.0.0.1:0"
        topics."{input}".partitions = 1
        topics."{output}".partitions = 1
        [stages.echo]
        component = "{component}"
        input = ["{input}"]
        group = "{group}"
        output = ["{output}"]
        config = {{ to = "{output}" }}
        [kafka]
        brokers = "{brokers}"
        [kafka.properties]
        "security.protocol" = "sasl_ssl"
        "ssl.ca.location" = "{authority}"
        "sasl.username" = "stagehost"
        {properties}
        "#
    )
}

async fn check(mechanism: &str, codec: &str) {
    let password = server("KAFKA_SASL_PASSWORD");
    let (input, output, group) = (unique("in"), unique("out"), unique("group"));
    let properties = format!(
        r#"
        "sasl.mechanism" = "{mechanism}"
        "sasl.password" = "{password}"
        "compression.type" = "{codec}"
        "#
    );
    let host = Host::start(&pipeline(&properties, &input, &output, &group));
    // From another listener of the same broker.
    let log = Log::new(&server("KAFKA_BROKERS"));
    let value = "the same again ".repeat(100);
    log.produce(&input, &[(Some("k"), &value)]).await;
    log.wait_committed(&group, &input);
    let seen = log.read(&output);
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].value.as_ref(), Some(&value), "{mechanism}, {codec}");
    let (status, said) = host.stop();
    assert!(status.success(), "{said}");
    assert!(!said.contains(&password), "no secret in the log");
}

#[tokio::test(flavor = "multi_thread")]
async fn scram_sha_512_and_zstd() {
    check("SCRAM-SHA-512", "zstd").await;
    check("SCRAM-SHA-512", "none").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn scram_sha_256_with_lz4_and_gzip() {
    check("SCRAM-SHA-256", "lz4").await;
    check("SCRAM-SHA-256", "gzip").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_and_snappy() {
    check("PLAIN", "snappy").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_password_is_said_without_it() {
    let properties = r#"
        "sasl.mechanism" = "SCRAM-SHA-512"
        "sasl.password" = "not-the-password"
        "#;
    let text = pipeline(properties, &unique("in"), &unique("out"), &unique("group"));
    let host = Host::spawn(Arc::new(tempfile::tempdir().expect("a folder")), &text, &[]);
    let said = host.wait_for("the reason", || {
        Some(host.log()).filter(|log| log.to_lowercase().contains("authentication failed"))
    });
    assert!(!said.contains("not-the-password"), "{said}");
    assert!(host.stop().0.success());
}

#[tokio::test(flavor = "multi_thread")]
async fn plaintext_to_a_port_that_speaks_tls_is_named() {
    let text = pipeline("", &unique("in"), &unique("out"), &unique("group"));
    let secure = "\"security.protocol\" = \"sasl_ssl\"";
    let text = text.replace(secure, "\"security.protocol\" = \"plaintext\"");
    let text = text.replace("\"sasl.username\" = \"stagehost\"", "");
    let folder = Arc::new(tempfile::tempdir().expect("a folder"));
    let host = Host::spawn(folder, &text, &[]);
    let admin = host.admin_of_a_start();
    host.wait_for("the cause", || {
        let (status, said) = crate::support::get(&admin, "/readyz");
        (status == 503 && said.contains("speaks TLS")).then_some(())
    });
    host.wait_for("the log", || {
        host.log().contains("security.protocol").then_some(())
    });
}

//! The wire of control: one request a line, one answer a line, both JSON. docs/control.md.

use base::{Fail, Why};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

/// The version that this code speaks.
pub const VERSION: u32 = 1;
/// Bytes of a request at the most.
pub const REQUEST: usize = 64 << 10;
/// Bytes of an answer at the most.
pub const ANSWER: usize = 4 << 20;

/// What can be asked of a VM.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Request {
    /// All that there is to know about it.
    Inspect,
    /// An orderly end: SIGTERM to its command; without one, the end.
    Stop,
    /// A signal to its command; without one, the end of the VM at once.
    Kill {
        /// The number of the signal.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        signal: Option<u8>,
    },
    /// A wire to its agent: from the answer on, this connection is one (docs/agent-protocol.md).
    Agent,
    /// Other settings of a device.
    Set {
        /// The name of the device.
        device: String,
        /// `key=value,key=value`.
        change: String,
    },
}

/// A request as it is sent.
#[derive(Serialize, Deserialize)]
struct Envelope {
    version: u32,
    #[serde(flatten)]
    request: Value,
}

impl Request {
    /// Its line.
    pub fn line(&self) -> Vec<u8> {
        let request = serde_json::to_value(self).unwrap_or_default();
        line(&serde_json::to_value(Envelope { version: VERSION, request }).unwrap_or_default())
    }

    /// Reads a line.
    ///
    /// # Errors
    /// [`Why::Usage`]: it is no request that we know.
    pub fn read(text: &[u8]) -> Result<Request, Fail> {
        let wrong = |cause: String| Fail::new(Why::Usage, "read the request").because(cause);
        let Envelope { version, request } =
            serde_json::from_slice(text).map_err(|cause| wrong(cause.to_string()))?;
        if version != VERSION {
            return Err(wrong(format!("it is of version {version}, and this VM speaks version {VERSION}"))
                .hint("ask with the mayfly that started the VM"));
        }
        serde_json::from_value(request).map_err(|cause| wrong(cause.to_string()))
    }
}

/// The line of an answer.
pub fn answer(answer: &Result<Value, Fail>) -> Vec<u8> {
    let value = match answer {
        Ok(value) => json!({ "ok": value }),
        Err(fail) => {
            json!({ "error": fail.summary(), "hint": fail.remedy(), "usage": fail.why == Why::Usage })
        }
    };
    line(&value)
}

/// Reads the line of an answer.
///
/// # Errors
/// The answer is one; or it is none.
pub fn read_answer(text: &[u8]) -> Result<Value, Fail> {
    let strange = |cause: &str| Fail::new(Why::Host, "read the answer of the VM").because(cause.to_owned());
    let mut value: Value = serde_json::from_slice(text).map_err(|cause| strange(&cause.to_string()))?;
    if let Some(ok) = value.get_mut("ok") {
        return Ok(ok.take());
    }
    let text = |key: &str| value.get(key).and_then(Value::as_str).map(str::to_owned);
    let why = if value.get("usage") == Some(&Value::Bool(true)) { Why::Usage } else { Why::Host };
    let error = text("error").ok_or_else(|| strange("it is neither good nor bad"))?;
    let fail = Fail::new(why, error);
    Err(text("hint").into_iter().fold(fail, Fail::hint))
}

fn line(value: &Value) -> Vec<u8> {
    let mut bytes = value.to_string().into_bytes();
    bytes.push(b'\n');
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_and_answers_survive_the_wire() {
        for (request, text) in [
            (Request::Inspect, r#"{"request":"inspect","version":1}"#),
            (Request::Kill { signal: None }, r#"{"request":"kill","version":1}"#),
            (Request::Kill { signal: Some(9) }, r#"{"request":"kill","signal":9,"version":1}"#),
            (
                Request::Set { device: "disk0".into(), change: "size=2G".into() },
                r#"{"change":"size=2G","device":"disk0","request":"set","version":1}"#,
            ),
        ] {
            assert_eq!(Request::read(text.as_bytes()).unwrap(), request);
            let again: Value = serde_json::from_slice(&request.line()).unwrap();
            assert_eq!(again, serde_json::from_str::<Value>(text).unwrap());
        }
        assert_eq!(read_answer(&answer(&Ok(json!({"a": 1})))).unwrap(), json!({"a": 1}));
        for why in [Why::Usage, Why::Host] {
            let fail =
                read_answer(&answer(&Err(Fail::new(why, "do it").because("no").hint("yes")))).unwrap_err();
            assert_eq!((fail.why, fail.to_string()), (why, "do it: no\n  hint: yes".to_owned()));
        }
    }

    #[test]
    fn what_is_no_request_is_refused() {
        for (text, told) in [
            ("", "EOF while parsing"),
            ("{}", "missing field `version`"),
            (r#"{"version":2,"request":"inspect"}"#, "it is of version 2, and this VM speaks version 1"),
            (r#"{"version":1,"request":"dance"}"#, "unknown variant `dance`, expected one of `inspect`"),
            (r#"{"version":1,"request":"kill","with":1}"#, "unknown field `with`"),
        ] {
            let fail = Request::read(text.as_bytes()).unwrap_err();
            assert!(fail.to_string().contains(told), "{text}: {fail}");
        }
        for text in ["", "[]", "{}", "{\"error\":1}"] {
            assert!(
                read_answer(text.as_bytes()).unwrap_err().to_string().contains("read the answer"),
                "{text}"
            );
        }
    }
}

//! Requests' bodies: not too large, not too slow, and JSON.

use crate::{Error, Result, Settings};
use axum::{
    body::Body,
    extract::Request,
    http::header::{CONTENT_LENGTH, CONTENT_TYPE},
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt;
use serde::de::DeserializeOwned;
use std::time::Duration;
use tokio::time::timeout;

/// How long the rest of a body is thrown away that is too large: whoever sends it would otherwise find
/// the connection closed, and not the answer that says why.
const DRAIN: Duration = Duration::from_secs(2);

/// Reads a body of JSON.
///
/// # Errors
/// [`Error::MediaType`], [`Error::BodyTooLarge`], [`Error::BodyTooSlow`], [`Error::Invalid`].
pub(crate) async fn json<T: DeserializeOwned>(request: Request, settings: &Settings) -> Result<T> {
    // A page of somebody else can send forms and plain text anywhere, but not this type.
    let kind = request.headers().get(CONTENT_TYPE);
    let kind = kind.and_then(|kind| kind.to_str().ok()).unwrap_or_default();
    let kind = kind.split(';').next().unwrap_or_default().trim();
    if !kind.eq_ignore_ascii_case("application/json") {
        return Err(Error::MediaType);
    }
    let length = request.headers().get(CONTENT_LENGTH);
    let length = length.and_then(|n| n.to_str().ok()?.parse().ok());
    let body = request.into_body();
    if length.is_some_and(|n: usize| n > settings.max_body) {
        drain(body, settings.max_body).await;
        return Err(Error::BodyTooLarge(settings.max_body));
    }
    let bytes = timeout(settings.body_timeout, read(body, settings.max_body)).await;
    let bytes = bytes.map_err(|_| Error::BodyTooSlow(settings.body_timeout.as_secs()))??;
    serde_json::from_slice(&bytes)
        .map_err(|e| Error::invalid(format!("the body is not right: {e}")))
}

async fn read(body: Body, most: usize) -> Result<Bytes> {
    let mut bytes = BytesMut::new();
    let mut parts = body.into_data_stream();
    while let Some(part) = parts.next().await {
        let part = part.map_err(|e| Error::invalid(format!("the body broke off: {e}")))?;
        if bytes.len() + part.len() > most {
            drain(Body::from_stream(parts), most).await;
            return Err(Error::BodyTooLarge(most));
        }
        bytes.extend_from_slice(&part);
    }
    Ok(bytes.freeze())
}

async fn drain(body: Body, most: usize) {
    let rest = async {
        let mut parts = body.into_data_stream();
        let mut left = most.saturating_mul(16);
        while let Some(Ok(part)) = parts.next().await {
            left = left.saturating_sub(part.len());
            if left == 0 {
                return;
            }
        }
    };
    // However it ends, there is nothing to be done about it.
    let _ = timeout(DRAIN, rest).await;
}

"""The guards of the service, each with the tests that notice when it is gone."""

from tests.proofs.removal import Removal, code, refusal

_SNAPSHOT = "test_a_snapshot_that_is_not_the_stores_is_replaced"

REMOVALS: list[Removal] = [
    # Limits of a picture.
    refusal("the picture has {} bytes; the limit is {}", "test_what_is_refused"),
    refusal("the limit is {} pixels a side", "test_what_is_refused"),
    refusal("the picture is {}x{}; the limit is {} pixels", "test_refused[9,000 x 9,000]"),
    refusal("the limit is {}:1 from side to side", "test_refused[10,000 x 1]"),
    refusal("scans", "test_small_files_that_ask_for_much_work_are_refused"),
    refusal("segments and fill bytes", "test_small_files_that_ask_for_much_work_are_refused"),
    refusal("the picture has more than {} chunks", "test_small_files_that_ask_for_much_work_are_refused"),
    refusal("a BMP with run lengths", "test_small_files_that_ask_for_much_work_are_refused"),
    code(
        "decode", "Image.open(io.BytesIO(data), formats=FORMATS)", "Image.open(io.BytesIO(data))", "test_refused[EPS]"
    ),
    # Limits of a body.
    refusal(
        "the body has {} bytes; the limit is {}", "test_a_length_beyond_the_limit_is_refused_before_the_body_comes"
    ),
    refusal("the body is larger than the limit of {} bytes", "test_what_comes_after_a_refusal_is_taken_and_dropped"),
    code("_open", "len(self._form.files) == self._most_files", "False", "test_more_than_max_bulk_images"),
    refusal("a picture has more than {} bytes, which is the limit", "test_more_than_max_request_bytes"),
    refusal("a text field has more than {} bytes", "test_a_text_field_has_a_limit"),
    refusal("the picture has more than {} bytes", "test_base64_that_is_too_long_is_refused_undecoded"),
    refusal("each with a filename, and texts elsewhere", "test_forms_whose_first_part_is_good"),
    refusal("not a multipart form that can be read: it is cut short", "test_forms_whose_first_part_is_good"),
    refusal("expected a body without Content-Encoding", "test_compressed_bodies"),
    refusal("expected a picture: a body of image/*", "test_refused[picture as "),
    code(
        "from_base64", "base64.b64decode(text, validate=True)", "base64.b64decode(text + '==')", "test_refused[base64"
    ),
    refusal("the form: {}; parameters belong in the address", "test_a_form_of_many_texts_is_refused"),
    # The guard before every route.
    code("_serve", "_check_path(scope)", "None", "test_refused[id "),
    refusal("expected headers of at most {} bytes", "test_headers_have_a_limit"),
    code("_serve", "_OPEN.fullmatch(path)", "True", "test_no_key_that_is_known"),
    code(
        "receive",
        "asyncio.timeout_at(self._deadline)",
        "asyncio.timeout_at(self._deadline + 9)",
        "test_a_slow_body_is_given_up_and_its_connection_closed",
    ),
    code("_drain", "drained <= self._most_drained", "True", "test_what_comes_after_a_refusal_is_taken_and_dropped"),
    code("send", "await self._drain()", "None", "test_what_comes_after_a_refusal_is_taken_and_dropped"),
    code("send", 'headers["Connection"] = "close"', "pass", "test_a_slow_body_is_given_up_and_its_connection_closed"),
    refusal("the service is receiving more than it may hold", "test_all_bodies_together_are_bounded"),
    code("__call__", "self._buffered -= exchange.received", "pass", "test_all_bodies_together_are_bounded"),
    code("_Exchange", "_REQUEST_ID.fullmatch(given)", "True", "test_a_request_id_is_taken_when_it_is_harmless"),
    code("_note", 'scope["state"].get("route", "other")', 'scope["path"]', "test_metrics_have_routes_and_no_paths"),
    code("send", 'headers["X-Content-Type-Options"] = "nosniff"', "pass", "test_a_browser_must_not_guess_types"),
    code("check", "not known", "False", "test_no_key_that_is_known"),
    refusal("this API key may read only", "test_keys_that_are_known"),
    code("answer", 'headers["WWW-Authenticate"] = "Bearer"', "pass", "test_no_key_that_is_known"),
    # Bounds on work.
    refusal("{} requests are waiting already", "test_one_too_many_is_busy_and_begins_nothing"),
    code("Place", "asyncio.timeout(timeout_s)", "asyncio.timeout(None)", "test_what_is_not_done_in_time_is_cancelled"),
    code("_look_out", "self._timeout.reschedule(0)", "None", "test_what_nobody_waits_for_any_more_is_not_begun"),
    code("wait", "future.cancel()", "None", "test_what_is_not_done_in_time_is_cancelled"),
    # Isolation of failures.
    code("_run", "job[1].set_running_or_notify_cancel()", "True", "test_callers_that_have_gone_are_passed_over"),
    code("_resolve", "len(batch) == 1 or (no_memory and halved)", "True", "test_a_bad_one_harms_nobody_else"),
    code("_resolve", "no_memory and halved", "False", "test_no_memory_for_the_halves_either_is_told_to_all"),
    code(
        "_run",
        "most = max(1, len(batch) // 2)",
        "pass",
        "test_a_batch_without_memory_is_halved_once_and_later_ones_are_smaller",
    ),
    code(
        "Encoder",
        "_alike(embedding, card.canary, _LEAST_KNOWN_COSINE)",
        "True",
        "test_the_canary_must_be_what_the_card_tells",
    ),
    code(
        "probe",
        "_alike(embedding, self._known, _LEAST_OWN_COSINE)",
        "True",
        "test_a_probe_notices_a_graph_that_has_changed_or_is_gone",
    ),
    # Limits of a request.
    code(
        "Body",
        'ConfigDict(extra="forbid", strict=True, frozen=True)',
        "ConfigDict(strict=True, frozen=True)",
        "test_refused[unknown field",
    ),
    code("_sentence", "part in _FIELDS", "True", "test_refused[unknown field"),
    code("_sentence", "abs(value) < _SHOWN_BELOW", "True", "test_refused[k of -123456789 in JSON]"),
    refusal("k: expected a whole number from 1 to {}{}", "test_refused[k of "),
    refusal("vector: expected {} numbers, got {}", "test_refused[vector "),
    refusal("vector: expected a direction, got only zeros", "test_searches_that_are_refused"),
    refusal("metadata: expected at most {} bytes, got {}", "test_refused[metadata over max_metadata_bytes"),
    refusal("metadata: expected at most {} levels of nesting", "test_refused[metadata of 33 levels"),
    code(
        "check_metadata",
        "json.dumps(metadata, ensure_ascii=False, allow_nan=False)",
        "json.dumps(metadata, ensure_ascii=False)",
        "test_metadata_that_is_refused",
    ),
    refusal("id: expected 1 to {} bytes, got {}", "test_refused[id of 2"),
    refusal("id: expected text without control characters", "test_ids"),
    code("check_id", 'id = unicodedata.normalize("NFC", id)', "pass", "test_ids"),
    refusal("filter: expected at most {} conditions", "test_depth_is_bounded", "test_filters_that_are_refused"),
    refusal("filter: $in expects a list of 1 to {} values", "test_filters_that_are_refused"),
    # Trusted files and states.
    refusal("its checksum is not that of its content", "test_any_flipped_bit_and_any_cut_is_noticed"),
    refusal("it has {} bytes, which its header does not say", _SNAPSHOT),
    refusal("it is of another encoder's store", _SNAPSHOT),
    refusal("it holds other items than the catalog", _SNAPSHOT),
    refusal("it holds other vectors than the catalog", _SNAPSHOT),
    code(
        "add",
        "checked(np.stack([item.embedding for item in latest.values()]), self._dimension)",
        "None",
        "test_embeddings_that_cannot_be_are_not_added",
    ),
    code(
        "_commit",
        "raise type(self._refusal)(str(self._refusal))",
        "pass",
        "test_when_the_commit_fails_nobody_is_acknowledged_and_searches_go_on",
    ),
    code(
        "_commit",
        "self.refuse(InvalidStore(said))",
        "None",
        "test_what_cannot_reach_the_index_is_an_error_of_the_store",
    ),
    code(
        "_pause",
        "self.refuse(StorePaused(reason))",
        "None",
        "test_when_the_commit_fails_nobody_is_acknowledged_and_searches_go_on",
    ),
    code("_checked", "zlib.crc32(blob) != checksum", "False", "test_a_damaged_vector_is_named"),
    code("lock", "fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)", "None", "test_a_second_writer_is_refused"),
    # Several pictures or queries in a request.
    code(
        "check_fingerprint",
        "fingerprint is not None and fingerprint != gallery.card.fingerprint",
        "False",
        "test_refused[fingerprint",
    ),
    refusal("expected at most {} queries, got {}", "test_refused[65 queries]"),
    code(
        "add_handlers",
        "app.add_exception_handler(ClientDisconnect, _on_disconnect)",
        "None",
        "test_a_client_that_goes_is_no_failure",
    ),
    code("check_count", "images > settings.max_images", "False", "test_refused[33 in"),
    refusal("the zip's member has more than {} bytes", "test_more_than_max_request_bytes"),
    refusal("the zip's member is packed in a way that is not taken", "test_bulk"),
    refusal("the zip's member is encrypted", "test_bulk"),
    code("Archive", "len(self._members) > settings.max_bulk_images", "False", "test_more_than_max_bulk_images"),
    refusal("expected a zip of at most {} pictures", "test_a_zip_of_more_members_than_pictures_is_refused_unread"),
    refusal("the zip unpacks to more than {} bytes", "test_a_zip_of_more_members_than_pictures_is_refused_unread"),
]

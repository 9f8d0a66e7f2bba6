// Requests to the server that served the page, with the key where there is one, and its errors as ApiError.

export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.name = "ApiError";
    this.status = status;
  }
}

/** No answer came: the server is gone, or too busy to say anything. */
export class UnreachableError extends Error {
  constructor() {
    super("no connection");
    this.name = "UnreachableError";
  }
}

const READ_TIMEOUT_MS = 8000;

export class Api {
  /** `keyForm` gives the key, and is shown when the server wants another one. */
  constructor(keyForm) {
    this.keyForm = keyForm;
  }

  async get(path) {
    const signal = AbortSignal.timeout(READ_TIMEOUT_MS);
    try {
      return await (await this.request("GET", path, { signal })).json();
    } catch (error) {
      throw signal.aborted ? new UnreachableError() : error;
    }
  }

  /** Sends JSON; the answer's JSON, or null for an empty one. */
  async send(method, path, body) {
    const text = await (await this.request(method, path, { body })).text();
    return text === "" ? null : JSON.parse(text);
  }

  /** The response, once its headers are there.
   *
   * @throws {ApiError} the server refused; UnreachableError: it is gone; AbortError is fetch's own.
   */
  async request(method, path, { body, accept = "application/json", signal } = {}) {
    const headers = { Accept: accept };
    if (body !== undefined) headers["Content-Type"] = "application/json";
    const key = this.keyForm.value;
    if (key !== null) headers.Authorization = `Bearer ${key}`;
    const response = await fetched(new URL(path, document.baseURI), {
      method, headers, signal, cache: "no-store", body: body === undefined ? undefined : JSON.stringify(body),
    });
    if (response.ok) return response;
    if (response.status === 401) this.keyForm.askAfter(key);
    throw new ApiError(response.status, errorText(await response.text(), response.status));
  }
}

/** fetch, with one error for what every browser words differently. */
async function fetched(url, options) {
  try {
    return await fetch(url, options);
  } catch (error) {
    throw error instanceof TypeError ? new UnreachableError() : error;
  }
}

/** The message inside any of the server's error shapes: OpenAI's, TGI's, plain. */
export function errorText(text, status) {
  try {
    const { error, message, detail } = JSON.parse(text);
    const found = error?.message ?? error ?? message ?? detail;
    return typeof found === "string" ? found : JSON.stringify(found ?? text);
  } catch {
    const isText = text.trim() !== "" && !text.trimStart().startsWith("<"); // not a proxy's page
    return isText ? text.trim() : `the server answered ${status}`;
  }
}

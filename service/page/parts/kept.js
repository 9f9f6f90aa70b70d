// The visitor's own pictures, kept in the browser's database so that a reload and Back still have them.

const DATABASE = "lookalike";
const TABLE = "pictures";
// So many sets of pictures are kept; the oldest goes first.
const MOST = 30;

/**
 * @typedef {{name: string, blob: Blob}} KeptFile
 */

/** @returns {Promise<IDBDatabase>} */
function openDatabase() {
  return new Promise((resolve, reject) => {
    const request = indexedDB.open(DATABASE, 1);
    request.addEventListener("upgradeneeded", () => request.result.createObjectStore(TABLE, { autoIncrement: true }));
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
  });
}

/**
 * @template T
 * @param {IDBTransactionMode} mode
 * @param {(table: IDBObjectStore) => IDBRequest<T>} act
 * @returns {Promise<T>}
 */
async function withTable(mode, act) {
  const database = await openDatabase();
  try {
    return await new Promise((resolve, reject) => {
      const transaction = database.transaction(TABLE, mode);
      const request = act(transaction.objectStore(TABLE));
      transaction.addEventListener("complete", () => resolve(request.result));
      transaction.addEventListener("error", () => reject(transaction.error));
      transaction.addEventListener("abort", () => reject(transaction.error));
    });
  } finally {
    database.close();
  }
}

/**
 * Keep files and return the key that finds them again.
 *
 * @param {(File | KeptFile)[]} files
 * @returns {Promise<string>}
 */
export async function keepFiles(files) {
  const kept = files.map((file) => ({ name: file.name || "your picture", blob: file instanceof File ? file : file.blob }));
  const key = await withTable("readwrite", (table) => table.add(kept));
  const keys = await withTable("readonly", (table) => table.getAllKeys());
  for (const old of keys.slice(0, Math.max(0, keys.length - MOST))) await withTable("readwrite", (table) => table.delete(old));
  return String(key);
}

/**
 * Put other files in the place of kept ones.
 *
 * @param {string} key
 * @param {KeptFile[]} files
 */
export async function replaceFiles(key, files) {
  await withTable("readwrite", (table) => table.put(files, Number(key)));
}

/**
 * The files that a key stands for; none if they are not kept any more.
 *
 * @param {string} key
 * @returns {Promise<KeptFile[]>}
 */
export async function keptFiles(key) {
  return (await withTable("readonly", (table) => table.get(Number(key) || 0))) ?? [];
}
